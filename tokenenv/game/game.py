"""The Markov game: a batch of images, one tensor call per decision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokenenv.data import ImageSource, Stream
from tokenenv.errors import UserError
from tokenenv.game.episode import Episode, Execution, default_execution
from tokenenv.game.rewards import Dora, Outcome, Reward, Turn, divergence
from tokenenv.game.rules import Observation, Rules
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.packing import unpack


@dataclass(frozen=True)
class Transition:
    """What one step of the game gives back.

    Attributes:
        observation: the next decision; None when the episode has ended.
        reward: ``(B, A)`` float32 per agent, or ``(B, 1)`` where all agents of an image share it.
        done: ``(B,)`` bool, whose episode ended with this step; here all or none.
        outcome: logits and labels at the end of the episode, else None.
    """

    observation: Observation | None
    reward: Tensor
    done: Tensor
    outcome: Outcome | None


class Game:
    """Vision Transformer inference as a Markov game, batched on one device.

    A fixed roster: an agent that may no longer act stays on it, sees zeros and its action is
    ignored. All images of the batch end together after :attr:`steps` decisions. No Python loop
    over images or agents; with masked execution no host-device sync before the end of an episode.
    What the dense model says of an image, once computed, is kept on the device: its logits, and
    for :class:`~tokenenv.game.rewards.Dora` with ``damage="drift"`` a summary token per decision.

    Args:
        backbone: the frozen model.
        rules: what agents see and do.
        reward: maps a :class:`~tokenenv.game.rewards.Turn` to ``(B, A)`` or ``(B, 1)`` rewards.
        source: where the images come from.
        batch_size: B, images per episode, repeats counted.
        repeats: how many times in a row each image is in the batch; several tries at one image
            tell a learner what the tries, and not the image, made of the reward.
        seed: of the order of the images.
        execution: ``masked``, ``padded`` or ``packed``; None takes what suits the device.
        privileged: whether observations also hold what a critic of DORA reads in training: all
            tokens, and in the state the dense model's logits and the course of the episode.

    Attributes:
        agents: A, the number of agents per image; ``actions``: how many each has.
        steps: decisions per episode.
        agent_dim, shared_dim, state_dim: widths of the observation's parts.
        images, labels, index: ``(B, C, H, W)``, ``(B,)``, and ``(B,)`` positions in the source.
        history: ``(B, P)`` bool which patches a token stood for after each decision so far.
        counts: ``(B,)`` visual tokens before the first decision and after each one so far.
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
        extra = backbone.classes + _COURSE_DIM if privileged else 0
        self.state_dim = rules.state_dim(backbone) + _NATIVE_DIM + extra
        if repeats < 1 or batch_size % repeats:
            raise UserError(
                f"batch_size={batch_size} must be a multiple of repeats={repeats}, at least 1"
            )
        self.repeats = repeats
        self._per_batch, self._part = batch_size // repeats, (0, 1)
        self._native: dict[int, tuple[Tensor, Tensor]] = {}
        self._prepared = False
        self.seed(seed)
        self.episode: Episode | None = None

    def seed(self, seed: int) -> None:
        """Start the order of the images anew."""
        if not self._prepared:
            # Dense logits are rounded as the images met in batches: what was played before the
            # seed would show in what comes after it.
            self._native.clear()
        self.stream = Stream(self.source, self._per_batch, seed, *self._part)
        self.batch_size = self.stream.part_size * self.repeats

    def share(self, rank: int, of: int, seed: int) -> None:
        """Play one of ``of`` processes' part of every batch, of images in the order of ``seed``.

        Together the processes play what one would; see :class:`~tokenenv.data.Stream` for what
        they must know of unreadable images.

        Raises:
            UserError: a batch has fewer different images than there are processes.
        """
        self._part = (rank, of)
        self.seed(seed)

    # Not inference_mode: a learner's autograd must be able to save what it is shown.
    @torch.no_grad()
    def reset(self) -> Observation:
        """Take the next batch of images and play up to the first decision."""
        batch = self.stream.next()
        device = self.backbone.device
        self.images = batch.images.to(device, self.backbone.dtype, non_blocking=True)
        self.labels = batch.labels.to(device, non_blocking=True)
        self.native, self._trail = self._dense(batch.index)
        self.index = batch.index.repeat_interleave(self.repeats)
        if self.repeats > 1:
            self.images, self.labels, self.native, self._trail = (
                t.repeat_interleave(self.repeats, dim=0)
                for t in (self.images, self.labels, self.native, self._trail)
            )
        self.episode = Episode(self.backbone, self.rules, self.images, execution=self.execution)
        patches = self.backbone.patches
        self._alive = torch.ones((len(self.images), patches), dtype=torch.bool, device=device)
        self.history: tuple[Tensor, ...] = ()
        self._damage: tuple[Tensor, ...] = ()
        self._highest_reward = torch.zeros((), device=device)
        self._known = _native_features(self.native, self.labels)
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
        self._damage = (*self._damage, *self._new_damage())
        outcome = (
            Outcome(episode.logits, self.labels, self.native)
            if episode.logits is not None
            else None
        )
        turn = Turn(
            step, self.steps, before, self._alive, self.history, outcome,
            self.rules.blocks[step], self.backbone.depth, self.counts, self._damage,
        )  # fmt: skip
        reward = self.reward(turn).float()
        if reward.shape not in ((len(before), self.agents), (len(before), 1)):
            raise UserError(
                f"the reward {type(self.reward).__name__} has shape {tuple(reward.shape)}: give "
                f"{(len(before), self.agents)}, or {(len(before), 1)} where agents share it"
            )
        highest = torch.linalg.vector_norm(reward, torch.inf)  # NaN if one is
        self._highest_reward = torch.maximum(self._highest_reward, highest)
        if outcome is None:
            return Transition(self._observe(), reward, self._done(False), None)
        if not self._highest_reward.isfinite():
            raise UserError(
                f"the reward {type(self.reward).__name__} gave a value that is not finite: "
                "check its parameters and that the model's logits are finite"
            )
        return Transition(None, reward, self._done(True), outcome)

    @property
    def counts(self) -> tuple[Tensor, ...]:
        """``(B,)`` visual tokens before the first decision and after each one so far."""
        assert self.episode is not None
        return self.episode.counts

    def _done(self, value: bool) -> Tensor:
        return torch.full((len(self.images),), value, device=self.backbone.device)

    def _observe(self) -> Observation:
        """The observation on the roster, with the critic's privileged numbers."""
        assert self.episode is not None
        seen = self.episode.observe(state=True)
        assert seen.state is not None
        tokens = self.episode.tokens
        state = [seen.state, self._known]
        if self.privileged:
            state += [self.native.float(), self._course()]

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
        """``(B, prefix + P, D)`` all living tokens, zeros for the others."""
        assert self.episode is not None
        tokens = unpack(self.episode.tokens)
        x = tokens.x * tokens.alive[..., None]
        full = tokens.prefix + self.backbone.patches
        return torch.nn.functional.pad(x, (0, 0, 0, full - x.shape[1]))

    def _course(self) -> Tensor:
        """``(B, 3)`` compression and damage so far, and what damage costs now."""
        depth, counts = self.backbone.depth, self.counts
        compressed = self._nothing()
        for block, before, after in zip(self.rules.blocks, counts, counts[1:], strict=False):
            compressed = compressed + (before - after) / counts[0] * (depth - block) / depth
        damage = self._damage[-1] if self._damage else self._nothing()
        penalty = self.reward.penalty / 300 if isinstance(self.reward, Dora) else 0.0
        return torch.stack([compressed, damage, torch.full_like(compressed, penalty)], dim=1)

    def _nothing(self) -> Tensor:
        """``(B,)`` zeros."""
        return torch.zeros(len(self.images), device=self.backbone.device)

    def _new_damage(self) -> tuple[Tensor, ...]:
        """What the last decision did to the images, as the reward measures it; else nothing."""
        reward, episode = self.reward, self.episode
        assert episode is not None
        if not isinstance(reward, Dora):
            return ()
        if reward.damage == "drift":
            here = self.backbone.summary(episode.tokens)
            there = self._trail[:, len(self.history) - 1]
            return (1 - torch.cosine_similarity(here, there, dim=1),)
        # The terminal form needs no way, only the end.
        if reward.terminal and not episode.done:
            return (self._nothing(),)
        last = self._damage[-1] if self._damage else self._nothing()
        rows = torch.arange(len(last), device=last.device)
        if self.execution != "masked":
            # Elsewhere the device would be waited for. What is known is of the decision before, or,
            # where only the end is paid for, of the untouched image.
            known = self.counts[0] if reward.terminal else self.counts[-2]
            rows = (self.counts[-1] < known).nonzero()[:, 0]
        logits = episode.finish(rows)
        return (last.index_copy(0, rows, divergence(self.native[rows], logits, reward.tau)),)

    def _dense(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The dense model on the images, computed once for each of the source.

        Returns:
            ``(B, K)`` logits; ``(B, T, D)`` the summary token when each decision but the first is
            due and at the end, T = 0 where the reward does not ask for it.
        """
        keys = index.tolist()
        missing = [i for i, key in enumerate(keys) if key not in self._native]
        if missing:
            fresh = self._run_dense(self.images[missing])
            for i, *row in zip(missing, *(t.float().unbind(0) for t in fresh), strict=True):
                self._native[keys[i]] = (row[0], row[1])
        logits, trail = zip(*(self._native[key] for key in keys), strict=True)
        return torch.stack(logits), torch.stack(trail)

    def _run_dense(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if not (isinstance(self.reward, Dora) and self.reward.damage == "drift"):
            return self.backbone(images), images.new_zeros(len(images), 0, self.backbone.dim)
        tokens, trail = self.backbone.embed(images), []
        due = self.rules.blocks[1:]
        for block in range(self.backbone.depth):
            if block in due and not self.rules.between:
                trail.append(self.backbone.summary(tokens))
            tokens, _ = self.backbone.attend(block, tokens)
            if block in due and self.rules.between:
                trail.append(self.backbone.summary(tokens))
            tokens = self.backbone.feed(block, tokens)
        trail.append(self.backbone.summary(tokens))
        return self.backbone.classify(tokens), torch.stack(trail, 1)

    def prepare(self, batch_size: int = 64) -> Iterator[int]:
        """Run the dense model on the whole source ahead, or a share; yields images done.

        Of several processes each does its share of the batches; what they find they tell each
        other with :meth:`dense` and :meth:`add_dense`.
        """
        self._prepared = True
        rank, of = self._part
        for index in torch.arange(len(self.source)).split(batch_size)[rank::of]:
            batch = self.source.batch(index)
            if len(batch.index):
                with torch.no_grad():
                    self.images = batch.images.to(self.backbone.device, self.backbone.dtype)
                    self._dense(batch.index)
            yield len(index)

    def dense(self) -> tuple[list[int], list[Tensor]]:
        """What the dense model said so far: images' positions, and tensors with a row for each."""
        rows = zip(*self._native.values(), strict=True)
        return list(self._native), [torch.stack(column).cpu() for column in rows]

    def add_dense(self, keys: list[int], columns: list[Tensor]) -> None:
        """Take over what another game's :meth:`dense` gave, of the same images."""
        on_device = [column.to(self.backbone.device) for column in columns]
        for key, logits, trail in zip(keys, *on_device, strict=True):
            self._native[key] = (logits, trail)


# Compression, damage, its price.
_COURSE_DIM = 3
# Dense model's probability of the label, its margin, and its entropy.
_NATIVE_DIM = 3


def _native_features(native: Tensor, labels: Tensor) -> Tensor:
    """``(B, 3)`` what only a critic in training may know: how sure the dense model is."""
    p = native.softmax(1)
    true = p.gather(1, labels[:, None])
    others = p.scatter(1, labels[:, None], 0.0).amax(1, keepdim=True)
    entropy = -(p * p.clamp(min=1e-12).log()).sum(1, keepdim=True)
    return torch.cat([true, true - others, entropy], dim=1)
