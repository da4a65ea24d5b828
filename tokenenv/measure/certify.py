"""Whether a reduced model loses no more than a budget: a one-sided bound for paired hits."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

from scipy.optimize import brentq
from torch import Tensor

LEVEL = 0.95
"""Confidence of a bound."""


class Pairs(NamedTuple):
    """On how many images two models differ.

    Attributes:
        wins: images that only the reduced model classifies rightly.
        losses: images that only the dense model classifies rightly.
        images: all of them.
    """

    wins: int
    losses: int
    images: int

    @staticmethod
    def of(labels: Tensor, dense: Tensor, reduced: Tensor) -> Pairs:
        """From ``(n,)`` labels and both models' predictions."""
        right, before = reduced == labels, dense == labels
        return Pairs(int((right & ~before).sum()), int((before & ~right).sum()), len(labels))

    @property
    def lost(self) -> float:
        """Top-1 lost, percentage points."""
        return 100.0 * (self.losses - self.wins) / self.images

    def __add__(self, other: tuple) -> Pairs:  # type: ignore[override]  # sums, no longer tuple
        return Pairs(*(a + b for a, b in zip(self, other, strict=True)))


def p_value(pairs: Pairs, budget: float) -> float:
    """Probability of losing so few images, or fewer, if ``budget`` points were lost.

    Tango's score test for a difference of paired proportions (Tango 1998, "Equivalence test and
    confidence interval for the difference in proportions for the paired-sample design", Statistics
    in Medicine 17), with a continuity correction of half an image, which keeps it on the safe side
    where few images differ: without it 500 images of which none differs would reject a loss of 0.5
    points at 0.056, and the exact probability is 0.082.

    Args:
        pairs: on how many images the models differ.
        budget: percentage points, above 0 and below 100.
    """
    wins, losses, n = pairs
    delta = budget / 100
    linear = (wins + losses) * (1 - delta) - 2 * delta * (n - losses)
    root = math.sqrt(linear * linear + 8 * n * wins * delta * (1 - delta))
    share = max((linear + root) / (4 * n), 0.0)  # of wins, under the hypothesis
    spread = math.sqrt(n * (2 * share + delta * (1 - delta)))
    return NormalDist().cdf((losses - wins + 0.5 - n * delta) / spread)


def most_lost(pairs: Pairs, level: float = LEVEL) -> float:
    """The loss that is not exceeded at a one-sided confidence of ``level``, percentage points.

    It is the largest budget that :func:`p_value` does not reject.
    """
    low, high = max(pairs.lost, 0.0) + 1e-9, 100 - 1e-9

    def beyond(budget: float) -> float:
        return p_value(pairs, budget) - (1 - level)

    if low >= high or beyond(high) >= 0:
        return 100.0
    return low if beyond(low) <= 0 else float(brentq(beyond, low, high, xtol=1e-6))


def fewest_images(budget: float, level: float = LEVEL) -> int:
    """How many images it takes to certify a budget if no image of them differs."""
    count = math.ceil(math.log(1 - level) / math.log1p(-budget / 100))
    while p_value(Pairs(0, 0, count), budget) > 1 - level:
        count += max(1, count // 100)
    return count


def images_to_certify(pairs: Pairs, budget: float, level: float = LEVEL) -> int | None:
    """How many images would certify the budget if the same shares of them were won and lost.

    None if as much as the budget is lost, which no number of images certifies. One image of each
    kind is added, so that a few images without a difference don't promise too much.
    """
    wins, losses, n = pairs.wins + 1, pairs.losses + 1, pairs.images + 2
    lost = (losses - wins) / n
    room = budget / 100 - lost
    if room <= 0:
        return None
    spread = (wins + losses) / n - lost * lost
    asked = NormalDist().inv_cdf(level) ** 2 * spread / room**2
    return max(math.ceil(asked), fewest_images(budget, level))
