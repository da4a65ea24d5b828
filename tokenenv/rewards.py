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
        native = self.native.float().log_softmax(1)
        reduced = self.logits.float().log_softmax(1)
        return torch.exp(-(native.exp() * (native - reduced)).sum(1))


@dataclass(frozen=True)
class Turn:
    """One decision of ``B`` images with ``A`` agents, and the end if it was the last.

    Attributes:
        step: 0-based decision; ``steps``: how many an episode has.
        before: ``(B, A)`` bool, alive before the decision; ``after``: alive after it.
        history: ``after`` of every decision of the episode so far, this one last.
        outcome: how the episode ended; None before the last decision is played out.
    """

    step: int
    steps: int
    before: Tensor
    after: Tensor
    history: tuple[Tensor, ...]
    outcome: Outcome | None


class Reward(Protocol):
    """Maps a turn to a reward per agent."""

    def __call__(self, turn: Turn) -> Tensor:
        """Rewards ``(B, A)``, finite."""


ClassReward = Literal["final", "each"]


def class_term(turn: Turn, alpha: float, when: ClassReward) -> Tensor:
    """RL4EViT's shared classification reward: ``alpha / alive`` to every living agent if correct.

    It is known, and paid, when the episode ends. ``final`` pays the agents alive at the end;
    ``each`` pays once per decision, those alive after it (the paper's code does that).
    """
    if turn.outcome is None:
        return torch.zeros_like(turn.after, dtype=torch.float32)
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
    """

    alpha: float = 1.0
    beta: float = 0.002

    def __call__(self, turn: Turn) -> Tensor:
        """Rewards ``(B, A)``."""
        reward = -self.beta * turn.after.float()
        if turn.outcome is not None:
            reward = reward + self.alpha * turn.outcome.fidelity[:, None]
        return reward


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
