"""What a learner's points are worth: the area under its front, between random and an oracle.

On one task and seed a learner shows points: the mean multiply-adds of a policy, its own cost
included, as a share of the dense model's, and its top-1 on the test images.

*Front.* The top-1 to be had for at most a cost ``c`` is the best of the points that cost no more.
It is a step function, never interpolated. Two points are everybody's: the dense model at 1, and a
constant guess, which costs nothing and is right once in as many classes as the model has.

*Area* ``A``. The front's mean over the task's range ``[low, high]`` of cost.

*Score.* ``(A - A_random) / (A_oracle - A_random)``. ``A_random`` is the mean area of the random
policy over the task's seeds, so random scores 0. The oracle chooses in hindsight: every image has
the task's reference plans (the dense model, the heuristic at each value of the task's grid, the
random policy of seed 0 at each) and takes the cheapest that classifies it rightly. With a mean
budget it first gives every image its cheapest plan, then upgrades the images that cost least to
make right: for hits that all count 1 that is the best possible. Its front is taken as above and
scores 1. It knows the labels and what each plan would do, so nobody is expected to come near; a
learner whose policies are better than all the plans could pass it.

*Aggregate.* Interquartile mean over seeds and tasks, and a 95 % percentile interval from a
bootstrap that draws seeds anew within each task (Agarwal et al. 2021, "Deep reinforcement learning
at the edge of the statistical precipice", section 4.3). ``A_random`` and ``A_oracle`` stay as they
are in it. ``rliable``, that paper's package, is not used: its release (1.2.0) needs ``arch<8``,
which fails to import with pandas 3, and draws from numpy's global generator in a Python loop. A
test compares the two where it is installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenenv.errors import UserError

Numbers = NDArray[np.float64]

REPLICATES = 10_000
"""Of the bootstrap; its own error of an interval's end is about 1 % of the interval's width."""


class Front(NamedTuple):
    """A step function: ``top1[i]`` from ``cost[i]`` up to ``cost[i + 1]``.

    Attributes:
        cost: ``(k,)`` increasing from 0, shares of the dense model's multiply-adds.
        top1: ``(k,)`` never falling, shares of the images.
    """

    cost: Numbers
    top1: Numbers

    def at(self, cost: Numbers) -> Numbers:
        """``(m,)`` the top-1 to be had for at most ``cost (m,)``, 0 or more."""
        return self.top1[np.searchsorted(self.cost, cost, side="right") - 1]

    def area(self, low: float, high: float) -> float:
        """The mean top-1 over ``[low, high]``."""
        edges = np.append(self.cost, np.inf).clip(low, high)
        return float((self.top1 * np.diff(edges)).sum() / (high - low))


def front(cost: Sequence[float], top1: Sequence[float], dense: float, guess: float) -> Front:
    """The front of a learner's points.

    Args:
        cost: ``(k,)`` shares of the dense model's multiply-adds.
        top1: ``(k,)`` shares of the images.
        dense: top-1 of the dense model.
        guess: top-1 of a constant guess.

    Raises:
        UserError: a number is not finite, or a cost is negative.
    """
    points = np.array([[0.0, *cost, 1.0], [guess, *top1, dense]])
    if not np.isfinite(points).all() or points.min() < 0:
        raise UserError(
            "a point of the learner is not finite or negative: check its multiply-adds and top-1"
        )
    return _running_best(*points)


def oracle_front(right: NDArray[np.bool_], cost: Numbers, guess: float) -> Front:
    """The front of the oracle that this module describes.

    Args:
        right: ``(n, k)`` whether plan ``k`` classifies image ``n`` rightly.
        cost: ``(n, k)`` or ``(k,)`` what it costs, shares of the dense model's multiply-adds.
        guess: top-1 of a constant guess, for budgets that not even the cheapest plans fit.
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
    """The score.

    Raises:
        UserError: the oracle is no better than random: the range tells nobody apart.
    """
    if not oracle > random:
        raise UserError(
            f"the oracle's area {oracle:.4f} is not above random's {random:.4f}: nothing can be "
            "told apart on these images, use more of them"
        )
    return (area - random) / (oracle - random)


class Interval(NamedTuple):
    """An interquartile mean and the ends of its 95 % interval; NaN where there is none."""

    iqm: float
    low: float
    high: float


def aggregate(scores: Sequence[Sequence[float]], seed: int = 0) -> Interval:
    """Interquartile mean of all scores, with its stratified bootstrap interval.

    Args:
        scores: of each task the scores of its seeds, at least one.
        seed: of the bootstrap.

    Returns:
        Without an interval where a task has fewer than two seeds.
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


def interquartile_mean(scores: Numbers) -> Numbers:
    """Mean over the last axis without the lowest and the highest quarter, rounded down each."""
    cut = scores.shape[-1] // 4
    kept = np.sort(scores, axis=-1)[..., cut : scores.shape[-1] - cut]
    found: Numbers = kept.mean(-1)
    return found
