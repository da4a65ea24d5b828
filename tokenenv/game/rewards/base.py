"""What a reward is a function of: one decision, and how the episode ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
        """``(B,)`` 1.0 where the reduced model names the true class."""
        return (self.logits.argmax(1) == self.labels).float()

    @property
    def fidelity(self) -> Tensor:
        """``(B,)`` exp(-KL(dense || reduced)), in (0, 1]: 1 where nothing changed."""
        return torch.exp(-divergence(self.dense, self.logits, tau=1.0))


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
        measured: ``(B,)`` after each decision so far, what :meth:`Reward.measure` gave; empty where
            it gives nothing.
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
    """What a reward can measure after a decision, beside what its :class:`Turn` tells.

    Nothing is computed before it is asked for.

    Attributes:
        counts: ``(B,)`` visual tokens before the first decision and after each one so far.
        done: whether this was the last decision.
        masked: whether images run in masked execution, where reading a value back from the device
            would make an accelerator wait.
        last: ``(B,)`` what was measured after the decision before; zeros at the first.
        dense: ``(B, K)`` logits of the dense model.
        finish: gives the logits ``(b, K)`` of the images ``(b,)`` if nothing more were removed
            from here on; another forward pass of the blocks that are left.
        summary: gives the summary token ``(B, D)`` now, see
            :meth:`~tokenenv.vit.backbone.Backbone.summary`.
        dense_summary: gives the dense model's at the same place; only for a reward with
            ``keeps_trail``.
    """

    counts: tuple[Tensor, ...]
    done: bool
    masked: bool
    last: Tensor
    dense: Tensor
    finish: Callable[[Tensor], Tensor]
    summary: Callable[[], Tensor]
    dense_summary: Callable[[], Tensor]


class Reward:
    """Maps each decision to a reward per agent.

    A subclass needs :meth:`__call__` alone; any other function of a :class:`Turn` is taken too, see
    :func:`as_reward`.

    Attributes:
        keeps_trail: whether the dense model's summary token at every decision is kept, for
            :meth:`measure`.
    """

    keeps_trail: bool = False

    def __call__(self, turn: Turn) -> Tensor:
        """Finite rewards ``(B, A)``, or ``(B, 1)`` where all agents of an image share it."""
        raise NotImplementedError

    @classmethod
    def fits(cls, token_agents: bool) -> bool:
        """Whether it is made for games of one agent per token, or for those of one per block."""
        return True

    @classmethod
    def defaults(cls, decisions: int, patches: int) -> dict[str, Any]:
        """Parameters whose default depends on the number of decisions and of patches."""
        return {}

    def check(self, decisions: int) -> None:
        """Raise :class:`~tokenenv.errors.UserError` unless it fits the number of decisions."""

    def measure(self, probe: Probe) -> Tensor | None:
        """``(B,)`` what the reward has to know of the images after a decision; None: nothing.

        It is found in ``turn.measured`` when the reward is called.
        """
        return None

    @property
    def price(self) -> float | None:
        """The parameter that weighs cost against damage, for closed loops; None without one."""
        return None

    def with_price(self, price: float) -> Reward:
        """The same reward with another price.

        Raises:
            UserError: it has none.
        """
        raise UserError(f"the reward {self.name} has no price: leave the closed loop out")

    @property
    def observed_price(self) -> float:
        """What a privileged critic sees of the price, from 0 to 1."""
        return 0.0

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return type(self).__name__


class FunctionReward(Reward):
    """A function of a :class:`Turn` as a reward.

    Args:
        function: gives rewards ``(B, A)`` or ``(B, 1)``.
    """

    def __init__(self, function: Callable[[Turn], Tensor]) -> None:
        self.function = function

    def __call__(self, turn: Turn) -> Tensor:
        """What the function gives."""
        return self.function(turn)

    @property
    def name(self) -> str:
        """The function's name, or its class's."""
        return getattr(self.function, "__name__", type(self.function).__name__)


def as_reward(reward: Reward | Callable[[Turn], Tensor]) -> Reward:
    """A reward itself, or a function as one."""
    return reward if isinstance(reward, Reward) else FunctionReward(reward)


def divergence(dense: Tensor, logits: Tensor, tau: float) -> Tensor:
    """``(B,)`` ``tau^2 KL(dense || logits)`` at temperature ``tau``, both ``(B, K)``."""
    one = (dense.float() / tau).log_softmax(1)
    other = (logits.float() / tau).log_softmax(1)
    return tau**2 * (one.exp() * (one - other)).sum(1)
