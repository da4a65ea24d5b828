"""Closed loops that adapt the price in a reward to the policy's accuracy or saving."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tokenenv.errors import UserError

HIGHEST_PENALTY = 300.0
"""Upper bound of the coefficient a in DORA-pruning's closed loop."""


@dataclass
class PenaltyLoop:
    """DORA's closed loop: the penalty rises while more accuracy is lost than allowed.

    ``a <- clip(a + 5 clip((d - d*) / 0.01, -2, 2), 0, 300)`` (arXiv 2609.34325, "Closed-loop
    coefficient"), where ``d`` is the drop in top-1 accuracy as a share of the images. It needs
    many held-back images: with 600 of them the noise of ``d`` is near 0.01. With few,
    :class:`ClosedLoop` is the better choice.

    Attributes:
        penalty: the current a.
        target: the allowed drop d*, in [0, 1].

    Raises:
        UserError: the target is outside [0, 1].
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
    """A price that rises while the saving is below a target, and falls while it is above.

    A fixed price leads to a different saving for every model and every stage of training. The idea
    is that of DORA-pruning's closed-loop coefficient, but it follows the saving, which is known
    without noise, instead of the drop in accuracy.

    Attributes:
        price: the current price; positive.
        target: the saving to reach, percent.
        rate: a call changes the price by a factor of at most ``exp(rate)``, and by that factor if
            the saving is 5 percentage points or more off the target.
    """

    price: float
    target: float
    rate: float = 0.2

    def follow(self, saving: float) -> float:
        """The next price after ``saving`` percent were saved."""
        self.price *= math.exp(self.rate * max(-1.0, min(1.0, (self.target - saving) / 5)))
        return self.price
