"""How much more often one model is right than another on the same images, and how surely."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_Z = NormalDist().inv_cdf(0.975)
DRAWS = 10_000
"""Of the bootstrap; its own error of an interval's end is about 1 % of the interval's width."""


class Difference(NamedTuple):
    """A mean paired difference and its 95 % interval, percentage points."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """Such as ``"-0.50 [-1.20, +0.20]"``."""
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"

    def __neg__(self) -> Difference:
        """The same with the two models exchanged."""
        return Difference(0.0 - self.mean, 0.0 - self.high, 0.0 - self.low)


def paired_difference(first: NDArray[np.generic], second: NDArray[np.generic]) -> Difference:
    """How much more often ``first`` is right than ``second``, on the same images.

    No interval has width zero: that no image of a few differs does not show that none ever does.

    For hits (0 or 1) the interval is method 10 of Newcombe 1998 ("Improved confidence intervals for
    the difference between binomial proportions based on paired data", Statistics in Medicine 17):
    Wilson's score intervals of both proportions, joined by the correlation of the two with a
    continuity correction.

    For shares of right views it is a percentile bootstrap over the images (Efron & Tibshirani 1993,
    section 13.3), always with the same draws, to which one image is added where ``first`` alone is
    right in all views and one where ``second`` alone is. How often each value occurs in a draw is
    multinomial; drawing these counts instead of images gives the same distribution and takes
    memory for the different values and not for the images.

    Args:
        first: ``(n,)`` hits, bool or the share of several views of an image.
        second: ``(n,)`` the same of the other.
    """
    one, other = first.astype(float), second.astype(float)
    if np.isin(np.concatenate([one, other]), (0.0, 1.0)).all():
        return _newcombe(one > 0, other > 0)
    mean = 100.0 * (one - other).mean().item()
    values, counts = np.unique(_with_unseen(one, other), return_counts=True)
    n = counts.sum()
    draws = np.random.default_rng(0).multinomial(n, counts / n, DRAWS) @ (100.0 * values) / n
    low, high = np.percentile(draws, [2.5, 97.5]).tolist()
    return Difference(mean, min(low, mean), max(high, mean))


def difference_over_seeds(first: NDArray[np.generic], second: NDArray[np.generic]) -> Difference:
    """How much more often runs of one kind are right than those of another, on the same images.

    The interval is that of other seeds and of other images: a percentile bootstrap that draws seeds
    and, apart from them, images, the same for all seeds (the pigeonhole bootstrap, Owen 2007, "The
    pigeonhole bootstrap", Annals of Applied Statistics 1). With few seeds it is somewhat narrow, as
    every bootstrap is: by a factor of about ``sqrt(1 - 1 / s)`` in its part that is due to seeds.

    Args:
        first: ``(s, n)`` hits or shares, as for :func:`paired_difference`, of ``s`` seeds.
        second: ``(s, n)`` of the other, paired with these seeds.
    """
    seeds, n = first.shape
    apart = 100.0 * (first.astype(float) - second.astype(float))
    values, counts = np.unique(apart, axis=1, return_counts=True)  # images alike in all seeds
    rng = np.random.default_rng(0)
    of_seeds = rng.multinomial(n, counts / n, DRAWS) @ values.T / n
    weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), DRAWS) / seeds
    low, high = np.percentile((of_seeds * weights).sum(1), [2.5, 97.5]).tolist()
    return Difference(apart.mean().item(), low, high)


def images_needed(
    first: NDArray[np.generic], second: NDArray[np.generic], within: float = 0.5
) -> int:
    """How many images a 95 % interval of the difference needs to be ``within`` points each side.

    From the normal approximation with the variance of these images and of one more in each
    direction, so that a few images without a difference do not promise too much.

    Args:
        first: ``(n,)`` hits, as for :func:`paired_difference`.
        second: ``(n,)`` the same of the other.
        within: half of the interval's width, percentage points.
    """
    spread = _with_unseen(first.astype(float), second.astype(float)).std().item()
    return math.ceil((_Z * 100.0 * spread / within) ** 2)


def _with_unseen(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """``(n + 2,)`` differences of each image, and of one more in each direction."""
    return np.append(first - second, [1.0, -1.0])


def _newcombe(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> Difference:
    n = len(first)
    both, neither = (first & second).sum().item(), (~first & ~second).sum().item()
    wins, losses = (first & ~second).sum().item(), (~first & second).sum().item()
    p, q = (both + wins) / n, (both + losses) / n
    (p_low, p_high), (q_low, q_high) = _wilson(p, n), _wilson(q, n)
    joint = both * neither - wins * losses
    if joint > 0:
        joint = max(joint - n / 2, 0)
    margins = (both + wins) * (losses + neither) * (both + losses) * (wins + neither)
    phi = joint / math.sqrt(margins) if margins else 0.0

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))

    low = p - q - reach(p - p_low, q_high - q)
    high = p - q + reach(p_high - p, q - q_low)
    return Difference(100.0 * (p - q), 100.0 * low, 100.0 * high)


def _wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion."""
    centre, scale = share + _Z**2 / (2 * n), 1 + _Z**2 / n
    half = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n * n))
    return (centre - half) / scale, (centre + half) / scale
