"""The search of DiffRate's rates."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import DEPTH, backbone, source

from agents.policies.words import parse_policy
from tokenenv.game.cost import Cost
from tokenenv.measure.evaluation import evaluate
from tokenenv.reducers import DiffRate

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
def search(script: ModuleType) -> Any:
    images = source().batch(torch.arange(16)).images
    with torch.inference_mode():
        native = backbone()(images).log_softmax(-1)
    return script.Search(backbone(), images, native, Cost(backbone()))


@torch.inference_mode()
def test_an_outcome_is_what_evaluation_says(search: Any) -> None:
    rates = replace(NOTHING, prune=(5, 0, 0, 3, 0, 0), merge=(0, 4, 0, 2, 0, 1))
    found = evaluate(backbone(), rates, source())
    assert 100 * search.outcome(rates).saving == pytest.approx(found.saving)
    assert search.outcome(NOTHING).damage == pytest.approx(0, abs=1e-6)


@torch.inference_mode()
def test_the_first_move_is_the_cheapest_of_all(search: Any) -> None:
    now, moves = search.outcome(NOTHING), []
    for kind in ("prune", "merge"):
        for block in range(DEPTH):
            numbers = tuple(4 * (i == block) for i in range(DEPTH))
            more = replace(NOTHING, **{kind: numbers})
            then = search.outcome(more)
            price = (then.damage - now.damage) / (then.saving - now.saving)
            moves.append((price, -then.saving, more))
    _, saved, cheapest = min(moves, key=lambda move: move[:2])
    assert search.run(-saved, 4) == cheapest


@torch.inference_mode()
def test_it_stops_at_the_first_rates_that_save_enough(search: Any) -> None:
    rates = search.run(0.4, 4)
    assert search.outcome(rates).saving >= 0.4
    total = sum(rates.prune) + sum(rates.merge)
    fewer = search.run(0.39, 4)
    assert sum(fewer.prune) + sum(fewer.merge) <= total
    with pytest.raises(SystemExit, match=r"no rates save 99\.9 %: ask for less"):
        search.run(0.999, 32)


def test_what_it_prints_evaluate_takes(script: ModuleType, capsys: pytest.CaptureFixture) -> None:
    script.main(["--saving", "10", "--images", "8", "--step", "8"])
    spec, saved = capsys.readouterr().out.splitlines()
    policy = parse_policy(spec, 12)
    assert isinstance(policy, DiffRate)
    assert float(saved.split()[0]) >= 10
