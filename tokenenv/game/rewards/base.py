"""What a reward is a function of: one decision, and how the episode ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


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


def divergence(native: Tensor, logits: Tensor, tau: float) -> Tensor:
    """``(B,)`` ``tau^2 KL(native || logits)`` at temperature ``tau``, both ``(B, K)``."""
    one = (native.float() / tau).log_softmax(1)
    other = (logits.float() / tau).log_softmax(1)
    return tau**2 * (one.exp() * (one - other)).sum(1)
