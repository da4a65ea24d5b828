"""DORA's dense reward of one agent per block."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenenv.errors import UserError
from tokenenv.game.rewards.base import Turn, divergence

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
