"""The suite's score: fronts, the oracle, normalisation, intervals, against other ways to them."""

from __future__ import annotations

import itertools
import math
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu, trim_mean

from tokenenv.errors import UserError
from tokenenv.suite.score import (
    Front,
    aggregate,
    front,
    improvement,
    interquartile_mean,
    normalised,
    oracle_front,
)

CELLS = 32
eighths = st.integers(0, CELLS).map(lambda i: i / CELLS)
points = st.lists(st.tuples(eighths, eighths), max_size=6)


def made(
    found: list[tuple[float, float]],
    dense: float = 0.75,
    guess: float = 0.125,
    kind: Literal["steps", "hull"] = "steps",
) -> Front:
    return front([c for c, _ in found], [t for _, t in found], dense, guess, kind)


def plain(found: list[tuple[float, float]], cost: float, dense: float, guess: float) -> float:
    everybody = [*found, (1.0, dense), (0.0, guess)]
    return max(top1 for c, top1 in everybody if c <= cost)


@given(points, eighths)
def test_a_front_is_the_best_for_the_money(found: list[Any], dense: float) -> None:
    stairs = made(found, dense)
    # All steps are at whole cells, so cells' middles give the integral exactly.
    middles = [(i + 0.5) / CELLS for i in range(CELLS)]
    expected = [plain(found, cost, dense, 0.125) for cost in middles]
    assert stairs.at(np.array(middles)).tolist() == expected
    part = slice(CELLS // 4, CELLS // 2)
    assert stairs.area(0.25, 0.5) == pytest.approx(np.mean(expected[part]))
    assert stairs.at(np.array([1.0])) == plain(found, 1.0, dense, 0.125)


@given(points, st.tuples(eighths, eighths))
def test_points_never_harm_and_dominated_ones_change_nothing(
    found: list[Any], new: tuple[float, float]
) -> None:
    before, after = made(found), made([*found, new])
    assert after.area(0.25, 0.75) >= before.area(0.25, 0.75) - 1e-12
    cost, top1 = new
    if top1 <= before.at(np.array([cost]))[0]:
        assert after.area(0.25, 0.75) == pytest.approx(before.area(0.25, 0.75))


@given(points, eighths)
def test_a_hull_is_the_best_mixture_of_two_policies(found: list[Any], dense: float) -> None:
    everybody = [*found, (1.0, dense), (0.0, 0.125)]
    shape = made(found, dense, kind="hull")
    steps = made(found, dense)
    for cost in (0.0, 0.21, 0.25, 0.5, 0.77, 1.0):
        mixed = [
            one[1] + (other[1] - one[1]) * share
            for one, other in itertools.product(everybody, repeat=2)
            for share in ((cost - one[0]) / (other[0] - one[0]) if other[0] > one[0] else 0.0,)
            if 0 <= share <= 1 and one[0] <= cost
        ]
        assert shape.at(np.array([cost]))[0] == pytest.approx(max(mixed), abs=1e-12)
        assert shape.at(np.array([cost]))[0] >= steps.at(np.array([cost]))[0] - 1e-12
    fine = np.linspace(0.25, 0.5, 4001)
    assert shape.area(0.25, 0.5) == pytest.approx(shape.at(fine).mean(), abs=1e-3)
    level = float(shape.top1[-1] + shape.top1[0]) / 2
    assert shape.at(np.array([shape.cheapest(level)]))[0] == pytest.approx(level)


def test_points_between_two_others_change_a_step_front_and_no_hull() -> None:
    ends, more = [(0.25, 0.5), (0.5, 0.75)], [(0.3, 0.55), (0.4, 0.65)]
    assert made([*ends, *more]).area(0.25, 0.5) > made(ends).area(0.25, 0.5) + 0.05
    hulls = [made(points, kind="hull").area(0.25, 0.5) for points in (ends, [*ends, *more])]
    assert hulls == pytest.approx([0.625, 0.625])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.1])
def test_numbers_that_are_none_are_refused(bad: float) -> None:
    with pytest.raises(UserError, match="not finite or negative"):
        front([bad], [0.5], 0.9, 0.1)
    with pytest.raises(UserError, match="not finite or negative"):
        front([0.5], [bad], 0.9, 0.1)


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 4]), st.integers(1, 3))
def test_the_oracle_is_the_best_choice_of_plans(seed: int, images: int, plans: int) -> None:
    rng = np.random.default_rng(seed)
    right = rng.random((images, plans)) < 0.5
    cost = rng.integers(1, 9, (images, plans)) / 8  # sums of these are exact
    stairs = oracle_front(right, cost, 0.0)
    rows = np.arange(images)
    choices = [np.array(c) for c in itertools.product(range(plans), repeat=images)]
    outcomes = [(cost[rows, c].mean(), right[rows, c].mean()) for c in choices]
    for budget in np.arange(0, 1.01, 1 / 32):
        best = max((hits for spent, hits in outcomes if spent <= budget), default=0.0)
        assert stairs.at(np.array([budget]))[0] == best


def test_the_oracle_is_nowhere_below_its_plans() -> None:
    rng = np.random.default_rng(0)
    cost = np.linspace(0.2, 1, 9)
    right = rng.random((50, 9)) < cost
    oracle = oracle_front(right, cost, 0.1)
    single = front(cost.tolist(), right.mean(0).tolist(), right[:, -1].mean(), 0.1)
    grid = np.linspace(0, 1, 500)
    assert (oracle.at(grid) >= single.at(grid)).all()
    assert (np.diff(oracle.cost) >= 0).all() and (np.diff(oracle.top1) >= 0).all()


def test_random_is_zero_and_the_oracle_one() -> None:
    assert normalised(0.8, 0.8, 0.9) == 0
    assert normalised(0.9, 0.8, 0.9) == 1
    assert normalised(0.7, 0.8, 0.9) == pytest.approx(-1)
    with pytest.raises(UserError, match="nothing can be told apart"):
        normalised(0.8, 0.9, 0.9)


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=23))
def test_the_interquartile_mean_is_scipys_trimmed_mean(scores: list[float]) -> None:
    assert interquartile_mean(np.array(scores)) == pytest.approx(trim_mean(scores, 0.25))


def test_the_interval_draws_seeds_within_tasks() -> None:
    # Tasks differ much and seeds not at all: nothing is uncertain.
    found = aggregate([[0.0] * 5, [1.0] * 5, [3.0] * 5])
    assert found.low == found.iqm == found.high
    assert found == aggregate([[3.0] * 5, [1.0] * 5, [0.0] * 5])
    assert aggregate([[1.0, 2.0, 4.0]]) == aggregate([[1.0, 2.0, 4.0]])  # the same draws
    single = aggregate([[1.0, 2.0], [3.0]])
    assert single.iqm == 2.0 and math.isnan(single.low) and math.isnan(single.high)


def test_the_interval_covers_what_it_should() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(150):
        scores = rng.normal([0.2, 0.6], 0.1, (12, 2)).T
        found = aggregate(scores.tolist(), seed=int(rng.integers(2**31)))
        # The expected interquartile mean of twelve of each, by simulation below.
        covered += found.low <= _EXPECTED <= found.high
    assert 0.86 <= covered / 150 <= 1.0


_SIMULATED = np.random.default_rng(2).normal([0.2, 0.6], 0.1, (20_000, 12, 2))
_EXPECTED = float(interquartile_mean(_SIMULATED.reshape(20_000, -1)).mean())


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=6),
    st.lists(st.integers(0, 5), min_size=1, max_size=6),
)
@settings(max_examples=20)
def test_the_probability_of_improvement_is_mann_whitneys(first: Any, second: Any) -> None:
    statistic = mannwhitneyu(first, second).statistic / (len(first) * len(second))
    found = improvement([first], [second])
    assert found.iqm == pytest.approx(statistic)
    assert improvement([second], [first]).iqm == pytest.approx(1 - statistic)
    if len(first) == len(second) == 1:
        assert math.isnan(found.low)
    else:
        assert 0 <= found.low <= found.high <= 1


def test_learners_are_told_apart_where_they_differ() -> None:
    low, high = [0.1, 0.12, 0.14, 0.11, 0.13], [0.2, 0.21, 0.22, 0.23, 0.24]
    assert improvement([high], [low]) == (1.0, 1.0, 1.0)
    alike = improvement([[0.1, 0.3, 0.2, 0.4, 0.5]], [[0.15, 0.25, 0.35, 0.45, 0.2]])
    assert alike.low < 0.5 < alike.high
    # Over two tasks the mean of both, and a single seed of one learner is taken as it is.
    assert improvement([high, low], [low, high]).iqm == 0.5
    assert improvement([high], [[0.215]]).iqm == pytest.approx(0.6)


def test_rliable_says_the_same() -> None:
    library = pytest.importorskip("rliable.library", exc_type=ImportError)
    metrics = pytest.importorskip("rliable.metrics")
    scores = np.random.default_rng(3).normal(0.5, 0.1, (5, 3))
    np.random.seed(0)
    point, interval = library.get_interval_estimates(
        {"a": scores}, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=4000
    )
    found = aggregate(scores.T.tolist())
    assert found.iqm == pytest.approx(point["a"][0])
    assert [found.low, found.high] == pytest.approx(interval["a"][:, 0], abs=0.006)
