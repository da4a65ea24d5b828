"""The interface of rewards: functions of one decision and of the episode's outcome."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tokenenv.errors import UserError


@dataclass(frozen=True)
class Outcome:
    """How an episode ended.

    Attributes:
        logits: ``(B, K)`` of the reduced model.
        labels: ``(B,)`` true classes.
        dense: ``(B, K)`` logits of the dense model.
    """

    logits: Tensor
    labels: Tensor
    dense: Tensor

    @property
    def correct(self) -> Tensor:
        """``(B,)`` 1.0 where the reduced model predicts the true class, else 0.0."""
        return (self.logits.argmax(1) == self.labels).float()

    @property
    def fidelity(self) -> Tensor:
        """``(B,)`` exp(-KL(dense || reduced)), in (0, 1]; 1 for the dense model's prediction."""
        return torch.exp(-divergence(self.dense, self.logits, tau=1.0))


@dataclass(frozen=True)
class Turn:
    """One decision of ``B`` images with ``A`` agents, and the end if it was the last.

    Attributes:
        step: which decision of the episode, from 0.
        steps: decisions per episode.
        before: ``(B, P)`` bool, which patches have a token before the decision.
        after: ``(B, P)`` bool, which have one after it.
        history: ``after`` of every decision of the episode so far, this one last.
        outcome: how the episode ended; None unless this is the last decision.
        block: the decision's block.
        depth: number of blocks of the model.
        counts: ``(B,)`` visual tokens before the first decision and after each one so far.
        measured: for each decision so far ``(B,)``, what :meth:`Reward.measure` returned; empty if
            it returns None.
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
    measured: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Probe:
    """What a reward can measure after a decision, in addition to what a :class:`Turn` holds.

    The functions compute nothing before they are called.

    Attributes:
        counts: ``(B,)`` visual tokens before the first decision and after each one so far.
        done: whether this was the last decision.
        masked: whether execution is masked; reading values back from the device would then
            synchronise with an accelerator.
        last: ``(B,)`` what was measured after the decision before; zeros at the first.
        dense: ``(B, K)`` logits of the dense model.
        finish: maps indices of images ``(b,)`` to their logits ``(b, K)`` if no further token were
            removed; runs the remaining blocks.
        summary: returns the summary token ``(B, D)`` now, see
            :meth:`~tokenenv.vit.backbone.Backbone.summary`.
        dense_summary: returns the dense model's summary token ``(B, D)`` at the same point; only
            for a reward with ``keeps_trail``.
    """

    counts: tuple[Tensor, ...]
    done: bool
    masked: bool
    last: Tensor
    dense: Tensor
    finish: Callable[[Tensor], Tensor]
    summary: Callable[[], Tensor]
    dense_summary: Callable[[], Tensor]


class Computation(Protocol):
    """What tokens cost, for rewards that price computation in another unit than by default.

    Attributes:
        weights: for each decision, what a token costs until the next one, over the mean of all.
    """

    weights: tuple[float, ...]

    def saved(self, turn: Turn) -> Tensor:
        """``(B,)`` share of the dense model's cost that a decision saves."""


class Reward:
    """Maps each decision to a reward per agent.

    A subclass only has to define :meth:`__call__`. Games also take a plain function of a
    :class:`Turn`, see :func:`as_reward`.

    Attributes:
        keeps_trail: whether the game keeps the dense model's summary token at every decision, for
            :meth:`measure`.
    """

    keeps_trail: bool = False

    def __call__(self, turn: Turn) -> Tensor:
        """Finite rewards ``(B, A)``, or ``(B, 1)`` if all agents of an image share one."""
        raise NotImplementedError

    @classmethod
    def fits(cls, token_agents: bool) -> bool:
        """Whether it fits games of one agent per token or, if that is False, per block."""
        return True

    @classmethod
    def defaults(cls, decisions: int, patches: int) -> dict[str, Any]:
        """Default values of parameters that depend on the number of decisions and patches."""
        return {}

    def check(self, decisions: int) -> None:
        """Raise :class:`~tokenenv.errors.UserError` unless it fits the number of decisions."""

    def measure(self, probe: Probe) -> Tensor | None:
        """Measure the images after a decision, before the reward is called.

        Returns:
            ``(B,)`` values that the game appends to ``turn.measured``; None to measure nothing.
        """
        return None

    @property
    def price(self) -> float | None:
        """The parameter that weighs cost against damage, for closed loops; None without one."""
        return None

    def with_price(self, price: float) -> Reward:
        """The same reward with another price.

        Raises:
            UserError: the reward has no price.
        """
        raise UserError(f"the reward {self.name} has no price: leave the closed loop out")

    def priced_by(self, computation: Computation) -> Reward:
        """The same reward with the computation that tokens cost taken from ``computation``.

        Raises:
            UserError: the reward can't price another computation.
        """
        raise UserError(
            f"the reward {self.name} prices tokens, not time: take cost=macs, or the reward "
            "cooperative or dora"
        )

    @property
    def observed_price(self) -> float:
        """The price as a privileged critic observes it, scaled to 0 to 1; 0 without a price."""
        return 0.0

    @property
    def name(self) -> str:
        """The reward's name in messages."""
        return type(self).__name__


class FunctionReward(Reward):
    """A function of a :class:`Turn` as a reward.

    Args:
        function: gives rewards ``(B, A)`` or ``(B, 1)``.
    """

    def __init__(self, function: Callable[[Turn], Tensor]) -> None:
        self.function = function

    def __call__(self, turn: Turn) -> Tensor:
        """The function's rewards ``(B, A)`` or ``(B, 1)``."""
        return self.function(turn)

    @property
    def name(self) -> str:
        """The function's name, or its class's."""
        return getattr(self.function, "__name__", type(self.function).__name__)


def as_reward(reward: Reward | Callable[[Turn], Tensor]) -> Reward:
    """A reward as it is, or a function wrapped as one.

    Raises:
        UserError: it is neither.
    """
    if not isinstance(reward, Reward) and not callable(reward):
        raise UserError(
            f"reward={reward!r:.60}: give a name, an instance such as tokenenv.Cooperative(), or a "
            "function of a Turn"
        )
    return reward if isinstance(reward, Reward) else FunctionReward(reward)


def divergence(dense: Tensor, logits: Tensor, tau: float) -> Tensor:
    """``(B,)`` ``tau^2 KL(dense || logits)`` at temperature ``tau``, both ``(B, K)``."""
    one = (dense.float() / tau).log_softmax(1)
    other = (logits.float() / tau).log_softmax(1)
    return tau**2 * (one.exp() * (one - other)).sum(1)
