"""Which candidate to recommend, from the images that took no part in choosing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenenv.measure.certify import LEVEL, fewest_images, images_to_certify, most_lost, p_value
from tokenenv.measure.speed import Speed
from tokenenv.tuning.trials import Trial


@dataclass(frozen=True)
class Row:
    """A candidate that was verified.

    Attributes:
        trial: on the choosing images.
        expected: the top-1 it was expected to lose there, see
            :func:`~tokenenv.tuning.trials.expected_losses`.
        speed: on the clock, in its fastest form.
        verified: on the verifying images.
        certified: whether it loses no more than the budget, at 95 % for all that are certified.
        bound: what it loses at most, percentage points: at 95 %; of one that is not certified at
            95 % for all rows together (Bonferroni).
    """

    trial: Trial
    expected: float
    speed: Speed
    verified: Trial
    certified: bool
    bound: float

    @property
    def what(self) -> str:
        """The candidate's name."""
        return self.trial.what


def certify(ladder: Sequence[Trial], budget: float) -> list[bool]:
    """Which of the verified candidates lose no more than ``budget`` points.

    They are tested one after the other, each at 5 %, in an order that was fixed on other images,
    the safest first, until one fails. The chance that any of those certified loses more is then at
    most 5 %, whatever their number: fixed-sequence testing, as in "Learn then test" (Angelopoulos
    et al. 2021).
    """
    found, sure = [], True
    for trial in ladder:
        sure = sure and p_value(trial.pairs, budget) <= 1 - LEVEL
        found.append(sure)
    return found


def bound_of(trial: Trial, certified: bool, count: int) -> float:
    """The bound of :class:`Row`; ``count``: number of candidates that were verified."""
    return most_lost(trial.pairs, LEVEL if certified else 1 - (1 - LEVEL) / count)


def recommend(rows: Sequence[Row], budget: float) -> tuple[Row | None, Row | None]:
    """The row to recommend, and the runner-up.

    The fastest certified one; if none is, the fastest that lost no more than the budget on the
    verifying images. The runner-up is the fastest of the others that stayed within the budget
    there. None is slower than the dense model.
    """
    fast = sorted((r for r in rows if r.speed.speedup > 1), key=lambda r: -r.speed.speedup)
    within = [row for row in fast if row.certified or row.verified.pairs.lost <= budget]
    first = next((row for row in within if row.certified), within[0] if within else None)
    second = next((row for row in within if row is not first), None)
    return first, second


def lost_words(points: float) -> str:
    """Such as ``"lost 0.25"`` or ``"gained 0.25"``."""
    return f"gained {-points:.2f}" if points < 0 else f"lost {points:.2f}"


def sureness(row: Row, budget: float, labelled: bool) -> str:
    """How sure it is that a row keeps to the budget, in words."""
    pairs, n = row.verified.pairs, row.verified.images
    measure = "of top-1" if labelled else "of the predictions"
    if row.certified:
        return (
            f"certified: it loses at most {row.bound:.2f} points {measure}, at 95 % confidence, by "
            f"{n} images that took no part in choosing"
        )
    least = fewest_images(budget)
    said = (
        f"not certified: on {n} images that took no part in choosing it {lost_words(pairs.lost)} "
        f"points {measure}, and it loses at most {row.bound:.2f} at 95 % confidence"
    )
    needed = images_to_certify(pairs, budget)
    if n < least:
        said += (
            f"; {n} images can't certify {budget:g} points for any method, {least:,} would for one "
            "that changes no prediction"
        )
    if needed is None:
        return f"{said}; if that is what it loses, no number of images certifies {budget:g}"
    return f"{said}; about {needed:,} verifying images like these would certify {budget:g}"
