"""Closed loops: how the price in a reward follows what the policy reaches."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tokenenv.errors import UserError

HIGHEST_PENALTY = 300.0
"""What the paper's closed loop clips its coefficient at."""


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
        self.penalty = max(0.0, min(HIGHEST_PENALTY, self.penalty + 5 * excess))
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
