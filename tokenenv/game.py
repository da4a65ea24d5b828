"""The Markov game: a batch of images, one tensor call per decision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokenenv.backbone import Backbone
from tokenenv.data import ImageSource, Stream
from tokenenv.episode import Episode, Execution, default_execution
from tokenenv.errors import UserError
from tokenenv.rewards import Outcome, Reward, Turn
from tokenenv.rules import Observation, TokenPrune


@dataclass(frozen=True)
class Transition:
    """What one step of the game gives back.

    Attributes:
        observation: the next decision; None when the episode has ended.
        reward: ``(B, P)`` float32 per agent.
        done: ``(B,)`` bool, whose episode ended with this step; here all or none.
        outcome: logits and labels at the end of the episode, else None.
    """

    observation: Observation | None
    reward: Tensor
    done: Tensor
    outcome: Outcome | None


class Game:
    """Vision Transformer inference as a Markov game, batched on one device.

    A fixed roster: agent ``p`` is image patch ``p``; a pruned agent stays on the roster, sees
    zeros and its action is ignored. All images of the batch end together after
    :attr:`steps` decisions. No Python loop over images or agents; with masked execution no
    host-device sync before the end of an episode.

    Args:
        backbone: the frozen model.
        rules: what agents see and do.
        reward: maps a :class:`~tokenenv.rewards.Turn` to ``(B, P)`` rewards.
        source: where the images come from.
        batch_size: B, images per episode, repeats counted.
        repeats: how many times in a row each image is in the batch; several tries at one image
            tell a learner what the tries, and not the image, made of the reward.
        seed: of the order of the images.
        execution: ``masked`` or ``padded``; None takes what suits the device.

    Attributes:
        agents: P, the number of agents per image.
        steps: decisions per episode.
        agent_dim, shared_dim, state_dim: widths of the observation's parts.
        images, labels, index: ``(B, C, H, W)``, ``(B,)``, and ``(B,)`` positions in the source.
        history: ``(B, P)`` bool who was alive after each decision of the episode so far.
    """

    def __init__(
        self,
        backbone: Backbone,
        rules: TokenPrune,
        reward: Reward,
        source: ImageSource,
        *,
        batch_size: int = 1,
        repeats: int = 1,
        seed: int = 0,
        execution: Execution | None = None,
    ) -> None:
        rules.check(backbone)
        self.backbone, self.rules, self.reward, self.source = backbone, rules, reward, source
        self.batch_size = batch_size
        self.execution = execution or default_execution(backbone.device)
        self.agents = backbone.patches
        self.actions = 2
        self.steps = len(rules.blocks)
        self.agent_dim = rules.agent_dim(backbone)
        self.shared_dim = rules.shared_dim(backbone)
        self.state_dim = rules.state_dim(backbone) + _NATIVE_DIM
        if repeats < 1 or batch_size % repeats:
            raise UserError(
                f"batch_size={batch_size} must be a multiple of repeats={repeats}, at least 1"
            )
        self.repeats = repeats
        self.seed(seed)
        self._native: dict[int, Tensor] = {}
        self.episode: Episode | None = None

    def seed(self, seed: int) -> None:
        """Start the order of the images anew."""
        self.stream = Stream(self.source, self.batch_size // self.repeats, seed)

    # Not inference_mode: a learner's autograd must be able to save what it is shown.
    @torch.no_grad()
    def reset(self) -> Observation:
        """Take the next batch of images and play up to the first decision."""
        batch = self.stream.next()
        device = self.backbone.device
        self.images = batch.images.to(device, self.backbone.dtype, non_blocking=True)
        self.labels = batch.labels.to(device, non_blocking=True)
        self.native = self._native_logits(batch.index)
        self.index = batch.index.repeat_interleave(self.repeats)
        if self.repeats > 1:
            self.images, self.labels, self.native = (
                t.repeat_interleave(self.repeats, dim=0)
                for t in (self.images, self.labels, self.native)
            )
        self.episode = Episode(self.backbone, self.rules, self.images, execution=self.execution)
        self._alive = torch.ones((len(self.images), self.agents), dtype=torch.bool, device=device)
        self.history: tuple[Tensor, ...] = ()
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        return self._observe()

    @torch.no_grad()
    def step(self, action: Tensor) -> Transition:
        """Play one decision of the whole batch.

        Args:
            action: ``(B, P)`` integers, 1 keep, 0 prune; ignored for agents that are not active.

        Raises:
            UserError: at the end of an episode in which a reward was not finite.
            RuntimeError: called before :meth:`reset` or after the end.
        """
        if self.episode is None or self.episode.done:
            raise RuntimeError("the episode is over: call reset() first")
        episode, before = self.episode, self._alive
        step = episode.step
        episode.act(episode.tokens.from_patches(action))
        self._alive = episode.tokens.patch_alive()
        self.history = (*self.history, self._alive)
        outcome = (
            Outcome(episode.logits, self.labels, self.native)
            if episode.logits is not None
            else None
        )
        turn = Turn(step, self.steps, before, self._alive, self.history, outcome)
        reward = self.reward(turn).float()
        self._finite &= reward.isfinite().all()
        if outcome is None:
            return Transition(self._observe(), reward, self._done(False), None)
        if not self._finite:
            raise UserError(
                f"the reward {type(self.reward).__name__} gave a value that is not finite: "
                "check its parameters and that the model's logits are finite"
            )
        return Transition(None, reward, self._done(True), outcome)

    def _done(self, value: bool) -> Tensor:
        return torch.full((len(self.images),), value, device=self.backbone.device)

    def _observe(self) -> Observation:
        """The observation on the roster of patches, with the critic's privileged numbers."""
        assert self.episode is not None
        seen = self.episode.observe(state=True)
        assert seen.state is not None
        tokens = self.episode.tokens
        return replace(
            seen,
            agents=tokens.to_patches(seen.agents),
            active=self._alive,
            state=torch.cat([seen.state, _native_features(self.native, self.labels)], dim=1),
        )

    def _native_logits(self, index: Tensor) -> Tensor:
        """``(B, K)`` the dense model's logits, computed once per image of the source."""
        keys = index.tolist()
        missing = [i for i, key in enumerate(keys) if key not in self._native]
        if missing:
            fresh = self.backbone(self.images[missing])
            for i, row in zip(missing, fresh.float().unbind(0), strict=True):
                self._native[keys[i]] = row
        return torch.stack([self._native[key] for key in keys])

    def prepare(self, batch_size: int = 64) -> Iterator[int]:
        """Compute the dense model's logits of the whole source ahead; yields images done."""
        for index in torch.arange(len(self.source)).split(batch_size):
            batch = self.source.batch(index)
            if len(batch.index):
                with torch.no_grad():
                    self.images = batch.images.to(self.backbone.device, self.backbone.dtype)
                    self._native_logits(batch.index)
            yield len(index)


# Dense model's probability of the label, its margin, and its entropy.
_NATIVE_DIM = 3


def _native_features(native: Tensor, labels: Tensor) -> Tensor:
    """``(B, 3)`` what only a critic in training may know: how sure the dense model is."""
    p = native.softmax(1)
    true = p.gather(1, labels[:, None])
    others = p.scatter(1, labels[:, None], 0.0).amax(1, keepdim=True)
    entropy = -(p * p.clamp(min=1e-12).log()).sum(1, keepdim=True)
    return torch.cat([true, true - others, entropy], dim=1)
