"""The paired difference over seeds and images."""

from __future__ import annotations

import numpy as np
import pytest

from tokenenv.measure.paired import difference_over_seeds, paired_difference


def test_one_seed_has_the_interval_of_its_images() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.random(2000) < 0.9, rng.random(2000) < 0.8
    alone = paired_difference(first, second)
    found = difference_over_seeds(first[None], second[None])
    assert found.mean == pytest.approx(alone.mean)
    assert [found.low, found.high] == pytest.approx([alone.low, alone.high], abs=0.15)


def test_seeds_that_differ_widen_the_interval() -> None:
    # All images alike, so that seeds alone are uncertain: the mean of three draws of 0, 10 and 20.
    first = np.repeat([[0.0], [0.1], [0.2]], 50, axis=1)
    found = difference_over_seeds(first, np.zeros((3, 50)))
    assert found.mean == pytest.approx(10)
    # 1 of 27 draws is of the lowest alone, so the ends are the lowest and the highest.
    assert (found.low, found.high) == (pytest.approx(0), pytest.approx(20))
    same = difference_over_seeds(np.full((3, 50), 0.1), np.zeros((3, 50)))
    assert (same.low, same.high) == (pytest.approx(10), pytest.approx(10))


def test_images_are_the_same_for_all_seeds() -> None:
    # Seeds that are right on the same images don't make these images more than they are.
    rng = np.random.default_rng(1)
    first, second = rng.random(400) < 0.9, rng.random(400) < 0.8
    one = difference_over_seeds(first[None], second[None])
    five = difference_over_seeds(np.tile(first, (5, 1)), np.tile(second, (5, 1)))
    assert [five.low, five.high] == pytest.approx([one.low, one.high], abs=0.3)
