"""Judging policies on held-back images: which of two is better, and which threshold to set."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from tqdm import tqdm


@dataclass(frozen=True)
class Judgement:
    """Results of a deterministic policy on images that it is not trained on.

    Attributes:
        saving: multiply-adds saved, percent, policy included.
        loss: mean cross-entropy, nats. Policies are chosen by it and not by top-1, because on some
            hundred images the top-1 of two policies differs by a few images only.
        drop: top-1 lost against the dense model, percentage points; reported, and used with
            ``target_drop``.
        bound, ib: for LTM, the separable bound on the information bottleneck and the bottleneck
            itself, nats; reported only.
    """

    saving: float
    loss: float
    drop: float
    bound: float | None = None
    ib: float | None = None

    def numbers(self) -> dict[str, float]:
        """The numbers that are known (not None), by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def beats(
        self, other: Judgement | None, target_saving: float, target_drop: float = 0.0
    ) -> bool:
        """Whether this judgement is better than ``other``.

        The better policy misses ``target_saving`` by less, where up to one percentage point counts
        as none. Of two that miss it equally, it is the one with the lower loss. With a
        ``target_drop`` (DORA-pruning's rule for checkpoints) the better policy exceeds the allowed
        drop by less; of two that exceed it equally, it is the one that saves more.

        Args:
            other: the judgement to compare with; None is always beaten.
            target_saving: multiply-adds to save, percent.
            target_drop: share of the images that top-1 may lose; 0: choose by ``target_saving``.
        """
        if other is None:
            return True
        if target_drop:
            mine, theirs = (max(j.drop - 100 * target_drop, 0.0) for j in (self, other))
            return (mine, -self.saving) < (theirs, -other.saving)
        mine, theirs = (max(target_saving - 1 - j.saving, 0.0) for j in (self, other))
        return (mine, self.loss) < (theirs, other.loss)


Judge = Callable[[Any], Judgement]
"""A function that measures a deterministic policy on held-back images."""


class Calibrated(Protocol):
    """A policy that decides by comparing probabilities with a threshold."""

    threshold: float

    @property
    def strict(self) -> int:
        """1 if a higher threshold removes more tokens, -1 if fewer."""


def calibrate(policy: Calibrated, judge: Judge, target_saving: float, steps: int) -> Judgement:
    """Choose the policy's threshold by bisection, so that the policy saves ``target_saving``.

    The search runs over the logit of the threshold, between thresholds of 0.02 and 0.98, and
    starts at 0.5.

    Args:
        policy: its threshold is set to the tried one with the smallest saving that reaches the
            target; if none reaches it, to the one with the largest saving.
        judge: measures a policy.
        target_saving: multiply-adds to save, percent.
        steps: number of thresholds to try, at least 1.

    Returns:
        The judgement at the threshold that was set.
    """
    low, high = -4.0, 4.0
    best: tuple[Judgement, float] | None = None
    for _ in tqdm(range(steps), "choosing the threshold", unit="try", leave=False, disable=None):
        middle = (low + high) / 2
        policy.threshold = 1 / (1 + math.exp(-middle * policy.strict))
        found = judge(policy)
        enough = found.saving >= target_saving
        # After a threshold that saves enough, bisection tries those that save less, else more.
        if best is None or enough or best[0].saving < target_saving:
            best = found, policy.threshold
        low, high = (low, middle) if enough else (middle, high)
    assert best is not None
    judgement, policy.threshold = best
    return judgement
