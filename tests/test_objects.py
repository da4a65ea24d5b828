"""Models and runs given as objects to the functions that also take their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tokenenv
from agents.policies.gated import GatedPolicy
from agents.training import Run
from tokenenv.api.opening import each_once
from tokenenv.errors import UserError

pytestmark = pytest.mark.usefixtures("elsewhere", "one_thread")


def compressed() -> tokenenv.CompressedViT:
    return tokenenv.compress("digits_vit", "norm:keep=0.5")


def with_ltm() -> Any:
    return tokenenv.ltm.ltm(tokenenv.load_backbone().model)


@pytest.mark.parametrize("make", [compressed, with_ltm])
def test_a_model_runs_in_the_asked_precision_and_stays_as_it_was(make: Any) -> None:
    model = make()
    model.train()
    found = tokenenv.evaluate(model, dtype="bfloat16", limit=10)
    assert found.to_dict()["dtype"] == "bfloat16" and found.evaluation.report()["images"] == 10
    assert model.training and next(model.parameters()).dtype is torch.float32


@pytest.mark.parametrize("make", [compressed, with_ltm])
def test_another_model_of_the_same_kind_is_another_row(make: Any) -> None:
    options = {"limit": 40, "batch": (), "out": "cmp"}
    model = make()
    before = tokenenv.compare([model], **options).to_dict()["rows"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1)
    after = tokenenv.compare([model], **options).to_dict()["rows"]
    assert after[-1]["top1"] != before[-1]["top1"]


def test_a_run_and_its_folder_are_one() -> None:
    run = Run(Path("runs/a"), {}, {})
    method = object()
    assert each_once([run, "runs/a", Path("runs/a"), method, method]) == [run, method]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("evaluate", {"batch": 0}, "batch=0 is no whole number from 1"),
        ("evaluate", {"limit": 0}, "limit=0"),
        ("bench", {"batch": []}, "batch is empty"),
        ("bench", {"batch": [1, 2.5]}, "batch=2.5"),
        ("bench", {"rounds": 0}, "rounds=0"),
        ("bench", {"threads": 0}, "threads=0"),
        ("compare", {"rounds": 0}, "rounds=0"),
        ("compare", {"batch": [0]}, "batch=0"),
    ],
)
def test_numbers_that_are_none(name: str, options: dict[str, Any], words: str) -> None:
    what = "tome:r=4" if name == "evaluate" else ["tome:r=4"]
    with pytest.raises(UserError, match=words):
        getattr(tokenenv, name)(what, **options)
    assert not list(Path.cwd().iterdir())


def test_a_selector_that_is_none() -> None:
    rules = tokenenv.LayerPrune((3,))
    with pytest.raises(UserError, match="selector='best': choose from learned, random, redundancy"):
        GatedPolicy(rules, {"key": 8, "own": 8, "patches": 64}, selector="best")  # type: ignore[arg-type]


def test_rules_that_are_a_class() -> None:
    with pytest.raises(UserError, match=r"give a name or an instance, such as tokenenv"):
        tokenenv.build_game(rules=tokenenv.TokenPrune)  # type: ignore[arg-type]
