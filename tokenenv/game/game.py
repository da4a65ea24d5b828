"""The Markov game: a batch of images, one tensor call per decision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenenv.data import Batch, ImageSource, Stream
from tokenenv.data.stream import Agree
from tokenenv.errors import UserError
from tokenenv.game.dense import CONFIDENCE_DIM, DenseAnswers, confidence
from tokenenv.game.episode import Episode, Execution, default_execution
from tokenenv.game.rewards import Outcome, Probe, Reward, Turn
from tokenenv.game.rules import Observation, Rules
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.packing import unpack


@dataclass(frozen=True)
class Transition:
    """What one step of the game returns.

    Attributes:
        observation: at the next decision; None when the episode has ended.
        reward: ``(B, A)`` float32 per agent, or ``(B, 1)`` if all agents of an image share it.
        done: ``(B,)`` bool, which images' episodes ended with this step: all or none.
        outcome: logits and labels at the end of the episode, else None.
    """

    observation: Observation | None
    reward: Tensor
    done: Tensor
    outcome: Outcome | None


@dataclass(frozen=True)
class Snapshot:
    """The state of a game, as :meth:`Game.snapshot` returns it.

    It shares its tensors with the game. No tensor of a game is written in place, so that neither
    changes the other.

    Attributes:
        values: the game's attributes; what changes in place was copied.
    """

    values: dict[str, Any]


class Game:
    """Vision Transformer inference as a Markov game, batched on one device.

    The number of agents is fixed: one that may no longer act observes zeros, and its action is
    ignored. All images of the batch end together after :attr:`steps` decisions. A step has no
    Python loop over images or agents and, with masked execution, no host-device sync before the end
    of an episode; :meth:`reset` looks up each image. What the dense model computes for an image is
    kept on the device while it fits into 256 MiB: its logits, and its summary token at each
    decision if the reward needs it.

    Args:
        backbone: the frozen model.
        rules: what agents observe and do.
        reward: maps a :class:`~tokenenv.game.rewards.Turn` to ``(B, A)`` or ``(B, 1)`` rewards; may
            be replaced between episodes, for instance by one with another price.
        source: the images.
        batch_size: B, images per episode, repeats included.
        repeats: how many times in a row each image is in the batch. The mean reward of the repeats
            is a baseline that depends on the image only.
        seed: seed of the order of the images.
        execution: ``masked``, ``padded`` or ``packed``; None: by device, see
            :func:`~tokenenv.game.episode.default_execution`.
        privileged: whether observations also hold what DORA's critic reads in training: all
            tokens, and in the state the dense model's logits and the progress of the episode.

    Attributes:
        agents: number A of agents per image.
        actions: number of actions of each agent.
        steps: decisions per episode.
        agent_dim, shared_dim, state_dim: widths F, G and S of the observation's parts.
        images, labels, index: ``(B, C, H, W)``, ``(B,)``, and ``(B,)`` positions in the source.
        dense: ``(B, K)`` float32 logits of the dense model.
        answers: what the dense model said of all images played so far.
        on_reset: called with the number of episodes before they start, or are restored or cloned
            before their end; does nothing unless set.
        history: after each decision so far, ``(B, P)`` bool, which patches have a token.
        counts: ``(B,)`` visual tokens before the first decision and after each one so far.

    Raises:
        UserError: the rules don't fit the model, or ``batch_size`` is no multiple of ``repeats``.
    """

    def __init__(
        self,
        backbone: Backbone,
        rules: Rules,
        reward: Reward,
        source: ImageSource,
        *,
        batch_size: int = 1,
        repeats: int = 1,
        seed: int = 0,
        execution: Execution | None = None,
        privileged: bool = False,
    ) -> None:
        rules.check(backbone)
        self.backbone, self.rules, self.reward, self.source = backbone, rules, reward, source
        self.execution = execution or default_execution(backbone.device)
        self.agents, self.actions = rules.agents(backbone), rules.actions(backbone)
        self.steps = len(rules.blocks)
        self.agent_dim = rules.agent_dim(backbone)
        self.shared_dim = rules.shared_dim(backbone)
        self.privileged = privileged
        extra = backbone.classes + COURSE_DIM if privileged else 0
        self.state_dim = rules.state_dim(backbone) + CONFIDENCE_DIM + extra
        if repeats < 1 or batch_size % repeats:
            raise UserError(
                f"batch_size={batch_size} must be a multiple of repeats={repeats}, at least 1"
            )
        self.repeats = repeats
        self._per_batch, self._part = batch_size // repeats, (0, 1)
        self._agree: Agree | None = None
        self.answers = DenseAnswers(backbone, rules)
        self.on_reset: Callable[[int], object] = lambda episodes: None
        self._prepared = False
        self.seed(seed)
        self.episode: Episode | None = None

    def seed(self, seed: int) -> None:
        """Restart the order of the images from ``seed``."""
        if not self._prepared:
            # Rounding of dense logits depends on which images share a batch. Logits kept from
            # before the seed would make what follows depend on what was played before.
            self.answers.clear()
        self.stream = Stream(self.source, self._per_batch, seed, *self._part, self._agree)
        self.batch_size = self.stream.part_size * self.repeats

    def share(self, rank: int, of: int, seed: int, agree: Agree | None = None) -> None:
        """Play only part ``rank`` of ``of`` of every batch, for data-parallel training.

        Together the processes play the batches that a single one would play from ``seed``; see
        :class:`~tokenenv.data.Stream` for ``agree`` and unreadable images.

        Raises:
            UserError: a batch has fewer different images than there are processes.
        """
        self._part, self._agree = (rank, of), agree
        self.seed(seed)

    # Not inference_mode: a learner's autograd must be able to save the observations.
    @torch.no_grad()
    def reset(self, batch: Batch | None = None) -> Observation:
        """Run the model up to the first decision.

        Args:
            batch: the images, without repeats, of :attr:`source`; None: the stream's next ones.
        """
        self.on_reset(self.batch_size)
        batch = self.stream.next() if batch is None else batch
        device = self.backbone.device
        self.images = batch.images.to(device, self.backbone.dtype, non_blocking=True)
        self.labels = batch.labels.to(device, non_blocking=True)
        self.dense, self._trail = self._ask(batch.index, self.images)
        self.index = batch.index.repeat_interleave(self.repeats)
        if self.repeats > 1:
            self.images, self.labels, self.dense, self._trail = (
                t.repeat_interleave(self.repeats, dim=0)
                for t in (self.images, self.labels, self.dense, self._trail)
            )
        self.episode = Episode(self.backbone, self.rules, self.images, execution=self.execution)
        patches = self.backbone.patches
        self._alive = torch.ones((len(self.images), patches), dtype=torch.bool, device=device)
        self.history: tuple[Tensor, ...] = ()
        self._measured: tuple[Tensor, ...] = ()
        self._highest_reward = torch.zeros((), device=device)
        self._known = confidence(self.dense, self.labels)
        return self._observe()

    @torch.no_grad()
    def step(self, action: Tensor) -> Transition:
        """Play one decision of the whole batch.

        Args:
            action: ``(B, A)`` integers; ignored for agents that are not active.

        Raises:
            UserError: a reward of another shape; at the end of an episode in which one was not
                finite.
            RuntimeError: called before :meth:`reset` or after the end.
        """
        if self.episode is None or self.episode.done:
            raise RuntimeError("the episode is over: call reset() first")
        episode, before = self.episode, self._alive
        step = episode.step
        episode.act(self.rules.from_roster(episode.tokens, action))
        self._alive = episode.tokens.patch_alive()
        self.history = (*self.history, self._alive)
        self._measure()
        outcome = (
            Outcome(episode.logits, self.labels, self.dense) if episode.logits is not None else None
        )
        turn = Turn(
            step=step,
            steps=self.steps,
            before=before,
            after=self._alive,
            history=self.history,
            outcome=outcome,
            block=self.rules.blocks[step],
            depth=self.backbone.depth,
            counts=self.counts,
            measured=self._measured,
        )
        reward = self.reward(turn).float()
        if reward.shape not in ((len(before), self.agents), (len(before), 1)):
            raise UserError(
                f"the reward {self.reward.name} has shape {tuple(reward.shape)}: give "
                f"{(len(before), self.agents)}, or {(len(before), 1)} where agents share it"
            )
        highest = torch.linalg.vector_norm(reward, torch.inf)  # NaN if one is
        self._highest_reward = torch.maximum(self._highest_reward, highest)
        if outcome is None:
            return Transition(self._observe(), reward, self._done(False), None)
        if not self._highest_reward.isfinite():
            raise UserError(
                f"the reward {self.reward.name} gave a value that is not finite: "
                "check its parameters and that the model's logits are finite"
            )
        return Transition(None, reward, self._done(True), outcome)

    def snapshot(self) -> Snapshot:
        """The state now, within an episode, before the first one or after the end of one.

        It holds the episode, the order of the images to come, the reward and what is known of the
        dense model. No tensor is copied.
        """
        return Snapshot(_separate(vars(self)))

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a state; from there the same actions give the same results, bit for bit.

        A snapshot can be restored any number of times. :attr:`on_reset` stays as it is, and is told
        of the episodes that are played a second time.

        Raises:
            UserError: the snapshot is of a game with another model, rules, images or execution.
        """
        for name in ("backbone", "rules", "source", "execution", "repeats", "privileged"):
            own, other = getattr(self, name), snapshot.values[name]
            if own is not other and (name in ("backbone", "source") or own != other):
                raise UserError(
                    f"the snapshot is of a game with another {name}: build this one alike"
                )
        values = _separate(snapshot.values) | {"on_reset": self.on_reset}
        vars(self).clear()
        vars(self).update(values)
        self._tell_of_repeats()

    def clone(self) -> Game:
        """A game in the same state that goes on by itself.

        It shares the model, the images and :attr:`on_reset`, which is told of the episodes that are
        now played twice. No tensor is copied.
        """
        twin = copy(self)
        vars(twin).update(_separate(vars(self)))
        twin._tell_of_repeats()
        return twin

    def _tell_of_repeats(self) -> None:
        if self.episode is not None and not self.episode.done:
            self.on_reset(self.batch_size)

    @property
    def counts(self) -> tuple[Tensor, ...]:
        """``(B,)`` visual tokens before the first decision and after each one so far."""
        assert self.episode is not None
        return self.episode.counts

    def _done(self, value: bool) -> Tensor:
        return torch.full((len(self.images),), value, device=self.backbone.device)

    def _observe(self) -> Observation:
        """The observation ordered by agent, with the numbers that only a critic reads."""
        assert self.episode is not None
        seen = self.episode.observe(state=True)
        assert seen.state is not None
        tokens = self.episode.tokens
        state = [seen.state, self._known]
        if self.privileged:
            state += [self.dense, self._course()]

        def on_roster(values: Tensor) -> Tensor:
            return self.rules.to_roster(self.backbone, tokens, values)

        return replace(
            seen,
            agents=on_roster(seen.agents),
            active=on_roster(seen.active),
            state=torch.cat(state, dim=1),
            tokens=self._all_tokens() if self.privileged else None,
        )

    def _all_tokens(self) -> Tensor:
        """``(B, prefix + P, D)`` the tokens that are left, then zeros."""
        assert self.episode is not None
        tokens = unpack(self.episode.tokens)
        x = tokens.x * tokens.alive[..., None]
        full = tokens.prefix + self.backbone.patches
        return torch.nn.functional.pad(x, (0, 0, 0, full - x.shape[1]))

    def _course(self) -> Tensor:
        """``(B, 3)`` compression and damage so far, and the price of damage now."""
        depth, counts = self.backbone.depth, self.counts
        compressed = self._nothing()
        for block, before, after in zip(self.rules.blocks, counts, counts[1:], strict=False):
            compressed = compressed + (before - after) / counts[0] * (depth - block) / depth
        damage = self._measured[-1] if self._measured else self._nothing()
        price = torch.full_like(compressed, self.reward.observed_price)
        return torch.stack([compressed, damage, price], dim=1)

    def _nothing(self) -> Tensor:
        """``(B,)`` zeros."""
        return torch.zeros(len(self.images), device=self.backbone.device)

    def _measure(self) -> None:
        """Let the reward measure what the last decision did to the images."""
        episode, backbone = self.episode, self.backbone
        assert episode is not None
        probe = Probe(
            counts=self.counts,
            done=episode.done,
            masked=self.execution == "masked",
            last=self._measured[-1] if self._measured else self._nothing(),
            dense=self.dense,
            finish=episode.finish,
            summary=lambda: backbone.summary(episode.tokens),
            dense_summary=lambda: self._trail[:, len(self.history) - 1],
        )
        found = self.reward.measure(probe)
        if found is not None:
            self._measured = (*self._measured, found)

    def _ask(self, index: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """The dense model's logits and summary tokens for ``images`` at ``index``."""
        self.answers.keep_trail(self.reward.keeps_trail)
        return self.answers(index, images)

    def prepare(self, batch_size: int = 64) -> Iterator[int]:
        """Run the dense model on the whole source in advance; yields numbers of images done."""
        self._prepared = True
        for index in torch.arange(len(self.source)).split(batch_size):
            batch = self.source.batch(index)
            if len(batch.index):
                with torch.no_grad():
                    self._ask(
                        batch.index, batch.images.to(self.backbone.device, self.backbone.dtype)
                    )
            yield len(index)


COURSE_DIM = 3
"""Numbers at the end of a privileged state: compression, damage, and the price of damage."""


def _separate(values: dict[str, Any]) -> dict[str, Any]:
    """A game's attributes, with copies of the objects that change in place."""
    episode = values["episode"]
    return {
        **values,
        "answers": values["answers"].copy(),
        "stream": copy(values["stream"]),
        "episode": None if episode is None else episode.copy(),
    }
