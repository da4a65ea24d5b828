"""The score of a learner: the area under its front, scaled between random and an oracle.

On one task and seed a learner has points. A point is a policy's mean multiply-adds, its own cost
included, as a share of the dense model's, and its top-1 on the test images.

*Front.* Two points are added for every learner: the dense model at cost 1, and a constant guess at
cost 0, whose top-1 is one over the number of classes. In tasks whose ``front`` is ``hull`` the
front is the upper concave hull of the points. Each point of it can be played: draw for each image
one of the two policies whose points it lies between. Who returns three policies is then measured as
one who returns ten. In tasks of version 0, whose ``front`` is ``steps``, the front at cost ``c`` is
the best top-1 of the points that cost at most ``c``.

*Area* ``A``. The front's mean over the task's range ``[low, high]`` of cost.

*Score.* ``(A - A_random) / (A_oracle - A_random)``. ``A_random`` is the mean area of the random
policy over the task's seeds, so random scores 0. The oracle chooses a plan for each image in
hindsight. The plans are the dense model, and the points of the heuristic and of the random policy
of seed 0. For a given mean budget it first gives every image its cheapest plan,
then upgrades images to their cheapest correct plan in the order of the extra cost, which is optimal
as all images count the same. Its front is taken as above and scores 1. The oracle knows the labels
and the result of every plan, so scores near 1 are not expected; a learner with better policies
than all plans could exceed 1.

*Aggregate.* Two learners are compared by the probability that a run of one scores higher than a run
of the other. Interquartile mean over seeds and tasks, and a 95 % percentile interval from a
bootstrap that resamples seeds within each task (Agarwal et al. 2021, "Deep reinforcement learning
at the edge of the statistical precipice", section 4.3). ``A_random`` and ``A_oracle`` are fixed in
the bootstrap. ``rliable``, that paper's package, is not used: its release (1.2.0) needs ``arch<8``,
which fails to import with pandas 3, and draws from numpy's global generator in a Python loop. A
test compares the two where it is installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenenv.errors import UserError

Numbers = NDArray[np.float64]

REPLICATES = 10_000
"""Number of bootstrap samples; their error is about 1 % of the interval's width."""


class Front(NamedTuple):
    """A step function: ``top1[i]`` from ``cost[i]`` up to ``cost[i + 1]``.

    Attributes:
        cost: ``(k,)`` increasing from 0, shares of the dense model's multiply-adds.
        top1: ``(k,)`` never falling, shares of the images.
    """

    cost: Numbers
    top1: Numbers

    def at(self, cost: Numbers) -> Numbers:
        """The front's top-1 ``(m,)`` at costs ``(m,)``, each 0 or more."""
        return self.top1[np.searchsorted(self.cost, cost, side="right") - 1]

    def area(self, low: float, high: float) -> float:
        """The mean top-1 over ``[low, high]``."""
        edges = np.append(self.cost, np.inf).clip(low, high)
        return float((self.top1 * np.diff(edges)).sum() / (high - low))

    def cheapest(self, top1: float) -> float:
        """The lowest cost at which the front has ``top1``, which its last point has."""
        return float(self.cost[(self.top1 >= top1).argmax()])


class Hull(Front):
    """A concave front: straight from ``(cost[i], top1[i])`` to the next, level after the last."""

    def at(self, cost: Numbers) -> Numbers:
        """The front's top-1 ``(m,)`` at costs ``(m,)``, each 0 or more."""
        return np.interp(cost, self.cost, self.top1)

    def area(self, low: float, high: float) -> float:
        """The mean top-1 over ``[low, high]``."""
        inside = self.cost[(low < self.cost) & (self.cost < high)]
        edges = np.concatenate([[low], inside, [high]])
        top1 = self.at(edges)
        return float(((top1[1:] + top1[:-1]) / 2 * np.diff(edges)).sum() / (high - low))

    def cheapest(self, top1: float) -> float:
        """The lowest cost at which the front has ``top1``, which its last point has."""
        end = int((self.top1 >= top1).argmax())
        if end == 0:
            return float(self.cost[0])
        return float(np.interp(top1, self.top1[end - 1 : end + 1], self.cost[end - 1 : end + 1]))


def hull(steps: Front) -> Hull:
    """The upper concave hull of a step front's corners; nowhere below the front."""
    kept: list[tuple[float, float]] = []
    for cost, top1 in zip(steps.cost.tolist(), steps.top1.tolist(), strict=True):
        if kept and cost == kept[-1][0]:  # the later one is at least as high
            kept.pop()
        while len(kept) > 1 and _rise(kept[-2], kept[-1]) <= _rise(kept[-2], (cost, top1)):
            kept.pop()
        kept.append((cost, top1))
    return Hull(*np.array(kept).T)


def _rise(start: tuple[float, float], end: tuple[float, float]) -> float:
    return (end[1] - start[1]) / (end[0] - start[0])


def front(
    cost: Sequence[float],
    top1: Sequence[float],
    dense: float,
    guess: float,
    kind: Literal["steps", "hull"] = "steps",
) -> Front:
    """The front of a learner's points.

    Args:
        cost: ``(k,)`` shares of the dense model's multiply-adds.
        top1: ``(k,)`` shares of the images.
        dense: top-1 of the dense model.
        guess: top-1 of a constant guess.
        kind: of the front, see above.

    Raises:
        UserError: a number is not finite, or a cost is negative.
    """
    points = np.array([[0.0, *cost, 1.0], [guess, *top1, dense]])
    if not np.isfinite(points).all() or points.min() < 0:
        raise UserError(
            "a point of the learner is not finite or negative: check its multiply-adds and top-1"
        )
    steps = _running_best(*points)
    return hull(steps) if kind == "hull" else steps


def oracle_front(right: NDArray[np.bool_], cost: Numbers, guess: float) -> Front:
    """The front of the oracle that this module describes.

    Args:
        right: ``(n, k)`` bool, whether plan ``k`` classifies image ``n`` correctly.
        cost: ``(n, k)`` or ``(k,)`` its cost, shares of the dense model's multiply-adds.
        guess: top-1 of a constant guess, for budgets below that of the cheapest plans.
    """
    cost = np.broadcast_to(cost, right.shape)
    cheapest = cost.min(1)
    upgrade = np.where(right, cost, np.inf).min(1) - cheapest
    upgrade = np.sort(upgrade[np.isfinite(upgrade)])
    budget = cheapest.mean() + upgrade.cumsum() / len(cost)
    hits = np.arange(1, len(upgrade) + 1) / len(cost)
    return _running_best(np.append(0.0, budget), np.append(guess, hits))


def _running_best(cost: Numbers, top1: Numbers) -> Front:
    order = np.argsort(cost, kind="stable")
    return Front(cost[order], np.maximum.accumulate(top1[order]))


def normalised(area: float, random: float, oracle: float) -> float:
    """The score of an area, 0 for ``random`` and 1 for ``oracle``.

    Raises:
        UserError: the oracle's area is not above random's.
    """
    if not oracle > random:
        raise UserError(
            f"the oracle's area {oracle:.4f} is not above random's {random:.4f}: nothing can be "
            "told apart on these images, use more of them"
        )
    return (area - random) / (oracle - random)


class Interval(NamedTuple):
    """An interquartile mean, or another statistic, and its 95 % interval; NaN if there is none."""

    iqm: float
    low: float
    high: float


def aggregate(scores: Sequence[Sequence[float]], seed: int = 0) -> Interval:
    """Interquartile mean of all scores, with its stratified bootstrap interval.

    Args:
        scores: for each task the scores of its seeds, at least one.
        seed: seed of the bootstrap.

    Returns:
        The mean and its interval; no interval if a task has fewer than two seeds.
    """
    strata = [np.asarray(task, float) for task in scores]
    mean = float(interquartile_mean(np.concatenate(strata)))
    if min(map(len, strata)) < 2:
        return Interval(mean, np.nan, np.nan)
    rng = np.random.default_rng(seed)
    drawn = [task[rng.integers(len(task), size=(REPLICATES, len(task)))] for task in strata]
    means = interquartile_mean(np.concatenate(drawn, axis=1))
    low, high = np.percentile(means, [2.5, 97.5]).tolist()
    return Interval(mean, low, high)


def improvement(
    first: Sequence[Sequence[float]], second: Sequence[Sequence[float]], seed: int = 0
) -> Interval:
    """How probably a run of one learner scores higher than a run of another, a tie counting half.

    The mean over tasks of the Mann-Whitney statistic of their seeds' scores, with a stratified
    bootstrap interval: "probability of improvement" of Agarwal et al. 2021, section 4.3.

    Args:
        first: for each task the scores of one learner's seeds.
        second: those of the other, on the same tasks.
        seed: of the bootstrap.

    Returns:
        The probability, and its interval; none where both have a single seed on some task.
    """
    pairs = [
        (np.asarray(a, float), np.asarray(b, float)) for a, b in zip(first, second, strict=True)
    ]
    found = float(np.mean([_higher(a, b) for a, b in pairs]))
    if any(len(a) == len(b) == 1 for a, b in pairs):
        return Interval(found, np.nan, np.nan)
    rng = np.random.default_rng(seed)
    drawn = [
        _higher(*(x[rng.integers(len(x), size=(REPLICATES, len(x)))] for x in pair))
        for pair in pairs
    ]
    low, high = np.percentile(np.mean(drawn, axis=0), [2.5, 97.5]).tolist()
    return Interval(found, low, high)


def _higher(first: Numbers, second: Numbers) -> Numbers:
    """Share of pairs in which one of ``first (..., n)`` is above one of ``second (..., m)``."""
    one, other = first[..., :, None], second[..., None, :]
    share: Numbers = ((one > other) + 0.5 * (one == other)).mean((-2, -1))
    return share


def interquartile_mean(scores: Numbers) -> Numbers:
    """Mean over the last axis without the lowest and highest ``floor(n / 4)`` values."""
    cut = scores.shape[-1] // 4
    kept = np.sort(scores, axis=-1)[..., cut : scores.shape[-1] - cut]
    found: Numbers = kept.mean(-1)
    return found
