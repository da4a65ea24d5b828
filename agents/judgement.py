"""How good a deterministic policy is, which of two is better, and where to set its threshold."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tqdm import tqdm

from agents.policy import ActorPolicy


@dataclass(frozen=True)
class Judgement:
    """A deterministic policy on images it does not train on.

    Attributes:
        drop: top-1 lost against the dense model, percentage points.
        saving: multiply-adds saved, percent, policy included.
    """

    drop: float
    saving: float

    def beats(self, other: Judgement | None, target_drop: float) -> bool:
        """DORA's rule: the largest saving within the target, else the smallest drop."""
        if other is None:
            return True
        mine, theirs = max(self.drop, target_drop), max(other.drop, target_drop)
        return (mine, -self.saving) < (theirs, -other.saving)


Judge = Callable[[ActorPolicy], Judgement]
"""Measures the deterministic policy on held-back images."""


def calibrate(policy: ActorPolicy, judge: Judge, target_drop: float, steps: int) -> Judgement:
    """Set the policy's threshold to the highest saving within the target drop, by bisection.

    The drop grows with the threshold up to noise; the range of the threshold's logit, from 0.02
    to 0.98 as a probability, is halved ``steps`` times. The first try is 0.5.

    Args:
        policy: its threshold is set to the best one tried.
        judge: measures a policy.
        target_drop: percentage points that may be lost.
        steps: how many thresholds to try, at least one.

    Returns:
        The judgement at the threshold that was set.
    """
    low, high = -4.0, 4.0
    best: tuple[Judgement, float] | None = None
    for _ in tqdm(range(steps), "choosing the threshold", unit="try", leave=False, disable=None):
        middle = (low + high) / 2
        policy.threshold = 1 / (1 + math.exp(-middle))
        found = judge(policy)
        if best is None or found.beats(best[0], target_drop):
            best = found, policy.threshold
        if found.drop <= target_drop:
            low = middle
        else:
            high = middle
    assert best is not None
    judgement, policy.threshold = best
    return judgement
