"""The one-sided bound on top-1 lost keeps its promise, by the exact probabilities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm

from tokenenv.measure.certify import (
    Pairs,
    fewest_images,
    images_to_certify,
    most_lost,
    p_value,
)


def rejected(n: int, wins: float, budget: float) -> float:
    """Exact probability that ``budget`` points are rejected though they are lost.

    ``wins``: probability that an image is won; ``wins + budget / 100`` that it is lost.
    """
    lost, total = wins + budget / 100, 0.0
    for losses in range(int(binom.ppf(1 - 1e-9, n, lost)) + 1):
        chance = binom.pmf(losses, n, lost)
        others = np.arange(int(binom.ppf(1 - 1e-9, n - losses, wins / (1 - lost))) + 1)
        given = binom.pmf(others, n - losses, wins / (1 - lost))
        hits = [p_value(Pairs(int(w), losses, n), budget) <= 0.05 for w in others]
        total += chance * given[np.array(hits, dtype=bool)].sum()
    return total


@pytest.mark.parametrize("n", [200, 600, 1500])
@pytest.mark.parametrize("wins", [0.0, 0.005, 0.03])
@pytest.mark.parametrize("budget", [0.5, 2.0])
def test_a_loss_at_the_budget_is_certified_in_at_most_one_of_twenty(
    n: int, wins: float, budget: float
) -> None:
    assert rejected(n, wins, budget) <= 0.0505


def test_the_bound_is_the_budget_that_is_just_rejected() -> None:
    pairs = Pairs(12, 15, 600)
    bound = most_lost(pairs)
    assert p_value(pairs, bound) == pytest.approx(0.05, abs=1e-4)
    assert p_value(pairs, bound + 0.1) < 0.05 < p_value(pairs, bound - 0.1)
    # Near the normal bound of a mean, which takes no account of the continuity correction.
    normal = pairs.lost + 100 * norm.ppf(0.95) * math.sqrt(27 / 600 - (3 / 600) ** 2) / 600**0.5
    assert bound == pytest.approx(normal + 50 / 600, abs=0.1)
    assert most_lost(pairs, 0.99) > bound


def test_bounds_at_the_ends() -> None:
    assert most_lost(Pairs(0, 5, 5)) == 100.0
    assert most_lost(Pairs(30, 0, 600)) < 0.2  # 5 points were won
    assert most_lost(Pairs(0, 0, 600)) == pytest.approx(100 * 3 / 600, abs=0.11)  # rule of three


def test_images_needed() -> None:
    least = fewest_images(0.5)
    assert 598 <= least < 730 and p_value(Pairs(0, 0, least), 0.5) <= 0.05
    assert images_to_certify(Pairs(10, 16, 600), 0.5) is None  # 1 point was lost
    needed = images_to_certify(Pairs(12, 12, 600), 0.5)
    assert needed is not None
    share = needed / 602
    more = Pairs(round(13 * share), round(13 * share), needed)
    assert most_lost(more) == pytest.approx(0.5, abs=0.03)


def test_pairs_are_counted() -> None:
    labels = torch.tensor([0, 1, 2, 3])
    found = Pairs.of(labels, torch.tensor([0, 1, 0, 0]), torch.tensor([0, 0, 2, 1]))
    assert found == Pairs(1, 1, 4) and found.lost == 0
    assert found + Pairs(0, 2, 6) == Pairs(1, 3, 10)
