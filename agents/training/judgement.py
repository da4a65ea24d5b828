"""How good a deterministic policy is, which of two is better, and where to set its threshold."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from tqdm import tqdm


@dataclass(frozen=True)
class Judgement:
    """A deterministic policy on images it does not train on.

    Attributes:
        saving: multiply-adds saved, percent, policy included.
        loss: mean cross-entropy, nats. It decides between policies: with some hundred images it
            tells them apart where the top-1 of both is a matter of a few images.
        drop: top-1 lost against the dense model, percentage points; for the reader.
        bound, ib: of LTM, the separable bound on the information bottleneck and the bottleneck
            itself, nats; for the reader.
    """

    saving: float
    loss: float
    drop: float
    bound: float | None = None
    ib: float | None = None

    def numbers(self) -> dict[str, float]:
        """What is known, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def beats(
        self, other: Judgement | None, target_saving: float, target_drop: float = 0.0
    ) -> bool:
        """Whoever saves the target, up to a point; of two that do, the one with less loss.

        With a ``target_drop``, a share of the images: whoever loses no more; of two that do not,
        the one that saves more (DORA-pruning's rule for checkpoints).
        """
        if other is None:
            return True
        if target_drop:
            mine, theirs = (max(j.drop - 100 * target_drop, 0.0) for j in (self, other))
            return (mine, -self.saving) < (theirs, -other.saving)
        mine, theirs = (max(target_saving - 1 - j.saving, 0.0) for j in (self, other))
        return (mine, self.loss) < (theirs, other.loss)


Judge = Callable[[Any], Judgement]
"""Measures the deterministic policy on held-back images."""


class Calibrated(Protocol):
    """A policy with a threshold."""

    threshold: float

    @property
    def strict(self) -> int:
        """1 if a higher threshold removes more tokens, -1 if fewer."""


def calibrate(policy: Calibrated, judge: Judge, target_saving: float, steps: int) -> Judgement:
    """Set the policy's threshold so that the target is saved, by bisection.

    The logit of the threshold is searched from 0.02 to 0.98 as a probability; the first try is
    0.5.

    Args:
        policy: its threshold is set to the one tried that saves the target and least beyond it;
            if none does, to the one that saves most.
        judge: measures a policy.
        target_saving: multiply-adds to save, percent.
        steps: how many thresholds to try, at least one.

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
        # What is tried after one that saves enough saves less, after one that doesn't more.
        if best is None or enough or best[0].saving < target_saving:
            best = found, policy.threshold
        low, high = (low, middle) if enough else (middle, high)
    assert best is not None
    judgement, policy.threshold = best
    return judgement
