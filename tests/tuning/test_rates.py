"""The search of DiffRate's rates."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import DEPTH, backbone, source

from agents.policies.words import parse_policy
from tokenenv.errors import UserError
from tokenenv.game.cost import Cost
from tokenenv.game.latency import LatencyTable, TimeCost
from tokenenv.game.timing import Curve
from tokenenv.measure.evaluation import evaluate
from tokenenv.reducers import DiffRate
from tokenenv.tuning.rates import RateSearch, word_of

NOTHING = DiffRate(tuple(range(DEPTH)), (0,) * DEPTH, (0,) * DEPTH)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "examples" / "diffrate_search.py"
    spec = importlib.util.spec_from_file_location("diffrate_search", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def search() -> RateSearch:
    images = source().batch(torch.arange(16)).images
    with torch.inference_mode():
        dense = backbone()(images).log_softmax(-1)
    return RateSearch(backbone(), images, dense, Cost(backbone()))


@torch.inference_mode()
def test_an_outcome_is_what_evaluation_says(search: RateSearch) -> None:
    rates = replace(NOTHING, prune=(5, 0, 0, 3, 0, 0), merge=(0, 4, 0, 2, 0, 1))
    found = evaluate(backbone(), rates, source())
    assert 100 * search.outcome(rates).saving == pytest.approx(found.saving)
    assert search.outcome(NOTHING).damage == pytest.approx(0, abs=1e-6)


@torch.inference_mode()
def test_the_first_move_is_the_cheapest_of_all(search: RateSearch) -> None:
    now, moves = search.outcome(NOTHING), []
    for kind in ("prune", "merge"):
        for block in range(DEPTH - search.backbone.reads_prefix):
            numbers = tuple(4 * (i == block) for i in range(DEPTH))
            more = replace(NOTHING, **{kind: numbers})
            then = search.outcome(more)
            price = (then.damage - now.damage) / (then.saving - now.saving)
            moves.append((price, -then.saving, more))
    _, saved, cheapest = min(moves, key=lambda move: move[:2])
    assert search.run(-saved, 4) == cheapest


@torch.inference_mode()
def test_nothing_is_removed_where_it_saves_nothing(search: RateSearch) -> None:
    """The published cost would pay for dropping every patch in the last block."""
    seen: list[int] = []
    rates = replace(search, batch=8, passed=seen.append).run(0.3, 8)
    assert search.backbone.reads_prefix and rates.prune[-1] == rates.merge[-1] == 0
    assert set(seen) == {8} and len(seen) > 2 * 2 * (DEPTH - 1), "from the first move on"


@torch.inference_mode()
def test_it_stops_at_the_first_rates_that_save_enough(search: RateSearch) -> None:
    rates = search.run(0.4, 4)
    assert search.outcome(rates).saving >= 0.4
    total = sum(rates.prune) + sum(rates.merge)
    fewer = search.run(0.39, 4)
    assert sum(fewer.prune) + sum(fewer.merge) <= total
    with pytest.raises(UserError, match=r"no rates save 99\.9 %: ask for less"):
        search.run(0.999, 32)


def test_what_it_prints_evaluate_takes(script: ModuleType, capsys: pytest.CaptureFixture) -> None:
    script.main(["--saving", "10", "--images", "8", "--step", "8"])
    spec, saved = capsys.readouterr().out.splitlines()
    policy = parse_policy(spec, 12)
    assert isinstance(policy, DiffRate)
    assert float(saved.split()[0]) >= 10


class Fixed(TimeCost):
    """A made-up machine: a token takes 1 s in each half of a block, a decision ``price`` s."""

    def __init__(self, price: float) -> None:
        model, line = backbone(), Curve((0.0, 1e3), (0.0, 1e3))
        curves = dict.fromkeys(("attend 0", "feed 0", "head"), line)
        table = LatencyTable({"batch": 1}, 0.0, curves)
        always = Curve((1.0,), (price,))
        super().__init__(model, table, dict.fromkeys(range(model.depth), always))


@torch.inference_mode()
def test_a_decision_that_costs_time_is_taken_seldom_and_removes_much(search: RateSearch) -> None:
    """At 60 s a decision, which four tokens fewer in every later half of a block never save."""
    timed = replace(search, cost=Fixed(60.0))
    *_, (rates, outcome) = timed.path(4, sizes=(1, 4), last=0.2)
    used = [p + m for p, m in zip(rates.prune, rates.merge, strict=True) if p + m]
    assert outcome.saving >= 0.2 and len(used) <= DEPTH / 2 and min(used) >= 16
    # The saving by hand: tokens in halves of blocks and in the head, and the decisions.
    left, total = timed.backbone.patches + timed.backbone.prefix, 0.0
    for prune, merge in zip(rates.prune, rates.merge, strict=True):
        total += left
        left -= prune + merge
        total += left + 60.0 * bool(prune or merge)
    full = timed.backbone.patches + timed.backbone.prefix
    assert outcome.saving == pytest.approx(1 - (total + left) / (full * (2 * DEPTH + 1)))
    # Small moves save nothing where a decision costs as much, so that without large ones the path
    # ends where it starts.
    assert len(list(timed.path(4, sizes=(1,)))) == 1
    assert len(list(replace(search, cost=Fixed(0.0)).path(4, sizes=(1,), last=0.05))) > 1


def test_the_word_of_rates_names_them() -> None:
    rates = replace(NOTHING, prune=(5, 0, 0, 3, 0, 0), merge=(0, 4, 0, 2, 0, 0))
    word = word_of(rates)
    assert word == "diffrate:prune=5/0/3,merge=0/4/2,blocks=0/1/3"
    made = parse_policy(word, DEPTH)
    assert made == DiffRate((0, 1, 3), (5, 0, 3), (0, 4, 2))
    assert word_of(NOTHING) == "keep-all"
