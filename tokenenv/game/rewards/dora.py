"""DORA's dense reward for one agent per block."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tokenenv.errors import UserError, check_choice
from tokenenv.game.rewards.base import Computation, Probe, Reward, Turn, divergence
from tokenenv.game.rewards.price import HIGHEST_PENALTY

Damage = Literal["drift", "divergence"]


@dataclass(frozen=True)
class Dora(Reward):
    """DORA's dense reward for one agent per block; "dense" here means: paid at every decision.

    ``efficiency * dC - penalty * (g(d_l) - g(d_(l-1)))``, with ``dC = k (L - l) / (L N_0)`` for
    ``k`` tokens removed in block ``l`` of ``L`` (arXiv 2609.34325, "Reward").

    - ``divergence`` (the pruning paper's): ``d = tau^2 KL(dense || reduced)`` of the logits at
      temperature ``tau``, if no decision after this block removed anything;
      ``g(d) = d + d^2 / bend``. The increments telescope: an episode's rewards sum to
      ``efficiency C - penalty g(d_final)``, with C the sum of all ``dC``.
    - ``drift`` (ours; the merging paper's formula is not public, its abstract names feature
      fidelity and a non-linear penalty): ``d = 1 - cos`` between the summary tokens of the reduced
      and the dense model when the next decision is due, ``g(d) = exp(kappa d) - 1``; at the end
      ``penalty * tau^2 KL`` is subtracted, too. It needs no further forward pass.

    Attributes:
        efficiency: reward for removing all tokens at once before the first block.
        penalty: the coefficient a of :class:`PenaltyLoop`.
        damage: ``divergence`` or ``drift``.
        terminal: whether to pay the whole penalty at the end, for comparison with dense credit.
        tau: temperature of the KL divergence.
        kappa: steepness of ``drift``'s penalty.
        bend: d at which the quadratic part of ``divergence``'s penalty equals the linear one; 0:
            ``g(d) = d``, as in the paper.
        computation: what removed tokens save; None: ``dC`` as above.

    Raises:
        UserError: a value is out of range.
    """

    efficiency: float = 25.0
    penalty: float = 30.0
    damage: Damage = "divergence"
    terminal: bool = False
    tau: float = 3.0
    kappa: float = 10.0
    bend: float = 0.0
    computation: Computation | None = None

    def __post_init__(self) -> None:
        check_choice("damage", self.damage, Damage)
        for name in ("tau", "kappa"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}={getattr(self, name):g} must be greater than 0")
        for name in ("efficiency", "penalty", "bend"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name}={getattr(self, name):g} must be a finite number from 0")

    def __call__(self, turn: Turn) -> Tensor:
        """Rewards ``(B, 1)``."""
        share = self._saved(turn) if self.computation is None else self.computation.saved(turn)
        penalty = torch.zeros_like(share)
        if not self.terminal:
            penalty = self._bent(turn.measured[-1])
            if turn.step:
                penalty = penalty - self._bent(turn.measured[-2])
        elif turn.outcome is not None:
            penalty = self._bent(turn.measured[-1])
        if turn.outcome is not None and self.damage == "drift":
            penalty = penalty + divergence(turn.outcome.dense, turn.outcome.logits, self.tau)
        return (self.efficiency * share - self.penalty * penalty)[:, None]

    def _saved(self, turn: Turn) -> Tensor:
        removed = (turn.counts[-2] - turn.counts[-1]).float()
        return removed / turn.counts[0] * (turn.depth - turn.block) / turn.depth

    def _bent(self, damage: Tensor) -> Tensor:
        if self.damage == "drift":
            return (self.kappa * damage).exp() - 1
        return damage + damage**2 / self.bend if self.bend else damage

    @classmethod
    def fits(cls, token_agents: bool) -> bool:
        """Whether the game has one agent per block."""
        return not token_agents

    @property
    def keeps_trail(self) -> bool:  # type: ignore[override]
        """Whether the damage is ``drift``, which needs the dense model's summary tokens."""
        return self.damage == "drift"

    def measure(self, probe: Probe) -> Tensor:
        """``(B,)`` the damage d after a decision; see the class."""
        if self.damage == "drift":
            return 1 - torch.cosine_similarity(probe.summary(), probe.dense_summary(), dim=1)
        if self.terminal and not probe.done:
            return torch.zeros_like(probe.last)
        rows = torch.arange(len(probe.last), device=probe.last.device)
        if not probe.masked:
            # An image that lost no token since the last measurement keeps its damage. With a
            # terminal penalty the last measurement is that of the dense model.
            known = probe.counts[0] if self.terminal else probe.counts[-2]
            rows = (probe.counts[-1] < known).nonzero()[:, 0]
        found = divergence(probe.dense[rows], probe.finish(rows), self.tau)
        return probe.last.index_copy(0, rows, found)

    @property
    def price(self) -> float:
        """``penalty``."""
        return self.penalty

    def with_price(self, price: float) -> Dora:
        """The same reward with another ``penalty``."""
        return replace(self, penalty=price)

    def priced_by(self, computation: Computation) -> Dora:
        """The same reward with ``computation``."""
        return replace(self, computation=computation)

    @property
    def observed_price(self) -> float:
        """The penalty divided by the highest one that the paper's closed loop can set."""
        return self.penalty / HIGHEST_PENALTY
