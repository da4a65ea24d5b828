"""The papers' rewards as pure functions of what happened in a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from tokenenv.errors import UserError


@dataclass(frozen=True)
class Outcome:
    """How an episode ended.

    Attributes:
        logits: ``(B, K)`` of the reduced model.
        labels: ``(B,)`` true classes.
        native: ``(B, K)`` logits of the dense model.
    """

    logits: Tensor
    labels: Tensor
    native: Tensor

    @property
    def correct(self) -> Tensor:
        """``(B,)`` 1.0 where the reduced model names the true class."""
        return (self.logits.argmax(1) == self.labels).float()

    @property
    def fidelity(self) -> Tensor:
        """``(B,)`` exp(-KL(native || reduced)), in (0, 1]: 1 where nothing changed."""
        return torch.exp(-divergence(self.native, self.logits, tau=1.0))


@dataclass(frozen=True)
class Turn:
    """One decision of ``B`` images with ``A`` agents, and the end if it was the last.

    Attributes:
        step: 0-based decision; ``steps``: how many an episode has.
        before: ``(B, A)`` bool, alive before the decision; ``after``: alive after it.
        history: ``after`` of every decision of the episode so far, this one last.
        outcome: how the episode ended; None before the last decision is played out.
        block: the decision's block; ``depth``: how many the model has.
        counts: ``(B,)`` visual tokens before the first decision and after each one so far.
        damage: ``(B,)`` after each decision so far, how far the images have come from the dense
            model's way; only where the reward asks for it, see :class:`Dora`.
    """

    step: int
    steps: int
    before: Tensor
    after: Tensor
    history: tuple[Tensor, ...]
    outcome: Outcome | None
    block: int = 0
    depth: int = 1
    counts: tuple[Tensor, ...] = ()
    damage: tuple[Tensor, ...] = ()


class Reward(Protocol):
    """Maps a turn to a reward per agent."""

    def __call__(self, turn: Turn) -> Tensor:
        """Finite rewards ``(B, A)``, or ``(B, 1)`` where all agents of an image share it."""


ClassReward = Literal["final", "each"]


def class_term(turn: Turn, alpha: float, when: ClassReward) -> Tensor:
    """RL4EViT's shared classification reward: ``alpha / alive`` to every living agent if correct.

    It is known, and paid, when the episode ends. ``final`` pays the agents alive at the end;
    ``each`` pays once per decision, those alive after it (the paper's code does that).
    """
    if turn.outcome is None:
        return torch.zeros_like(turn.after[:, :1], dtype=torch.float32)
    paid = turn.history if when == "each" else turn.history[-1:]
    share = sum(after / after.sum(1, keepdim=True).clamp(min=1) for after in paid)
    assert isinstance(share, Tensor)
    return alpha * turn.outcome.correct[:, None] * share


@dataclass(frozen=True)
class AlphaBeta:
    """RL4EViT's reward: competition to leave, collaboration to classify (papers' "variant P").

    Every living agent pays ``beta`` per decision; the living share ``alpha`` if the prediction is
    right. With a constant probability p of being right a rational agent is indifferent at
    ``alive* = p alpha / beta`` (``class_reward="each"``), whatever the step.

    The paper prints no values; its code's comments have alpha 22 and 24, beta 0.1, 0.106 and
    0.031, for 196 tokens.
    """

    alpha: float = 24.0
    beta: float = 0.1
    class_reward: ClassReward = "each"

    def __post_init__(self) -> None:
        _check_class_reward(self.class_reward)

    def __call__(self, turn: Turn) -> Tensor:
        """Rewards ``(B, A)``."""
        return class_term(turn, self.alpha, self.class_reward) - self.beta * turn.after


@dataclass(frozen=True)
class KeepTarget:
    """The reward that RL4EViT's published code runs with ("variant C").

    With ``delta`` = share of living tokens minus the step's target, a living agent gets
    ``-exp(delta)`` while too many live, and one that left in this step ``-exp(-delta)`` while
    too few do; the living share ``alpha`` if the prediction is right. Unlike the code, an agent
    pruned earlier gets nothing: it could not act.

    Attributes:
        targets: share of tokens to be alive after each decision.
    """

    targets: tuple[float, ...] = (0.7, 0.49, 0.343)
    alpha: float = 24.0
    class_reward: ClassReward = "each"

    def __post_init__(self) -> None:
        _check_class_reward(self.class_reward)
        for target in self.targets:
            check_keep(target)

    def __call__(self, turn: Turn) -> Tensor:
        """Rewards ``(B, A)``."""
        self.check(turn.steps)
        delta = turn.after.float().mean(1, keepdim=True) - self.targets[turn.step]
        left = turn.before & ~turn.after
        control = torch.where(delta > 0, -delta.exp() * turn.after, -(-delta).exp() * left)
        return class_term(turn, self.alpha, self.class_reward) + control

    def check(self, steps: int) -> None:
        """Raise :class:`UserError` unless there is a target for each of ``steps`` decisions."""
        if steps != len(self.targets):
            raise UserError(
                f"keep-target reward has {len(self.targets)} targets for {steps} decisions: "
                "give one per decision block"
            )


@dataclass(frozen=True)
class Cooperative:
    """Our own cooperative form of alpha/beta: everyone is paid for the prediction, dead or alive.

    RL4EViT pays the survivors only, so a token that matters earns nothing by leaving a place to
    a better one, and what a token gains by staying hardly depends on what it shows. Here every
    agent, alive or not, gets ``alpha`` times the fidelity to the dense model's prediction at the
    end, and pays ``beta`` for each further share of the computation it uses itself.

    Attributes:
        alpha: weight of the fidelity.
        beta: price of staying alive from one decision to the next.
        shared: whether the price is shared too: each pays the mean over the image's P agents.
            Then all get the same reward, as learners of one team expect. The same balance of
            price and fidelity has P times the ``beta``: what an agent's stay costs each is a P-th.
    """

    alpha: float = 1.0
    beta: float = 0.002
    shared: bool = False

    def __call__(self, turn: Turn) -> Tensor:
        """Rewards ``(B, A)``."""
        reward = -self.beta * turn.after.float()
        if self.shared:
            reward = reward.mean(1, keepdim=True).expand_as(reward)
        if turn.outcome is not None:
            reward = reward + self.alpha * turn.outcome.fidelity[:, None]
        return reward


Damage = Literal["drift", "divergence"]


@dataclass(frozen=True)
class Dora:
    """DORA's dense reward of one agent per block, the same for all its tokens.

    ``efficiency * dC - penalty * (g(d_l) - g(d_(l-1)))``, with ``dC = k (L - l) / (L N_0)`` for
    ``k`` tokens removed in block ``l`` of ``L`` (arXiv 2609.34325, "Reward").

    - ``divergence`` (the pruning paper's): ``d = tau^2 KL(dense || reduced)`` of the logits at
      temperature ``tau``, if nobody decided anything after this block; ``g(d) = d + d^2 / bend``.
      The increments telescope: an episode's rewards sum to ``efficiency C - penalty g(d_final)``.
    - ``drift`` (for the merging paper, whose formula is not public: dense, feature fidelity,
      non-linear): ``d = 1 - cos`` of the summary token to the dense model's when the next decision
      is due, ``g(d) = exp(kappa d) - 1``; at the end ``penalty * tau^2 KL`` in addition. It costs
      no further forward pass.

    Attributes:
        efficiency: reward for removing all tokens at once before the first block.
        penalty: a, see :class:`PenaltyLoop`.
        damage: ``divergence`` or ``drift``.
        terminal: pay the whole penalty at the end only: without dense credit, for comparison.
        tau, kappa, bend: as above; ``bend`` 0: ``g(d) = d``, the paper's.
    """

    efficiency: float = 25.0
    penalty: float = 30.0
    damage: Damage = "divergence"
    terminal: bool = False
    tau: float = 3.0
    kappa: float = 10.0
    bend: float = 0.0

    def __post_init__(self) -> None:
        if self.damage not in ("drift", "divergence"):
            raise UserError(f"damage='{self.damage}': choose 'drift' or 'divergence'")
        for name in ("tau", "kappa"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}={getattr(self, name):g} must be greater than 0")
        for name in ("efficiency", "penalty", "bend"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name}={getattr(self, name):g} must be a finite number from 0")

    def __call__(self, turn: Turn) -> Tensor:
        """Rewards ``(B, 1)``."""
        removed = (turn.counts[-2] - turn.counts[-1]).float()
        share = removed / turn.counts[0] * (turn.depth - turn.block) / turn.depth
        penalty = torch.zeros_like(share)
        if not self.terminal:
            penalty = self._bent(turn.damage[-1])
            if turn.step:
                penalty = penalty - self._bent(turn.damage[-2])
        elif turn.outcome is not None:
            penalty = self._bent(turn.damage[-1])
        if turn.outcome is not None and self.damage == "drift":
            penalty = penalty + divergence(turn.outcome.native, turn.outcome.logits, self.tau)
        return (self.efficiency * share - self.penalty * penalty)[:, None]

    def _bent(self, damage: Tensor) -> Tensor:
        if self.damage == "drift":
            return (self.kappa * damage).exp() - 1
        return damage + damage**2 / self.bend if self.bend else damage


def divergence(native: Tensor, logits: Tensor, tau: float) -> Tensor:
    """``(B,)`` ``tau^2 KL(native || logits)`` at temperature ``tau``, both ``(B, K)``."""
    one = (native.float() / tau).log_softmax(1)
    other = (logits.float() / tau).log_softmax(1)
    return tau**2 * (one.exp() * (one - other)).sum(1)


@dataclass
class PenaltyLoop:
    """DORA's closed loop: the penalty rises while more accuracy is lost than allowed.

    ``a <- clip(a + 5 clip((d - d*) / 0.01, -2, 2), 0, 300)`` (arXiv 2609.34325, "Closed-loop
    coefficient"), ``d`` the share of images by which top-1 fell. Needs many held-back images: with
    600 the noise of ``d`` is near 0.01, see :class:`ClosedLoop` for those.

    Attributes:
        penalty: a, now.
        target: d*, in [0, 1].
    """

    penalty: float
    target: float

    def __post_init__(self) -> None:
        if not 0 <= self.target <= 1:
            raise UserError(
                f"target drop {self.target:g} is outside [0, 1]: give a share of the images, "
                "such as 0.01 for one percentage point"
            )

    def follow(self, drop: float) -> float:
        """The next penalty after top-1 fell by ``drop``, a share of the images."""
        excess = max(-2.0, min(2.0, (drop - self.target) / 0.01))
        self.penalty = max(0.0, min(300.0, self.penalty + 5 * excess))
        return self.penalty


@dataclass
class ClosedLoop:
    """A price that rises while less is saved than wanted, and falls while more is.

    A fixed price means another saving for every model and every stage of training. The idea is
    that of DORA-pruning's closed-loop coefficient, with the saving, which is known without noise,
    in place of the drop in accuracy.

    Attributes:
        price: now; positive.
        target: percent to save.
        rate: the price changes by a factor of ``exp(rate)`` at most per call; in full from 5
            percentage points off the target.
    """

    price: float
    target: float
    rate: float = 0.2

    def follow(self, saving: float) -> float:
        """The next price after ``saving`` percent were saved."""
        self.price *= math.exp(self.rate * max(-1.0, min(1.0, (self.target - saving) / 5)))
        return self.price


def check_keep(keep: float) -> None:
    """Raise :class:`UserError` unless ``keep`` is a share in (0, 1]."""
    if not 0.0 < keep <= 1.0:
        raise UserError(f"keep ratio {keep:g} is outside (0, 1]: give a share such as 0.7")


def _check_class_reward(value: str) -> None:
    if value not in ("final", "each"):
        raise UserError(f"class_reward='{value}': choose 'final' or 'each'")
