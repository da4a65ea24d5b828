"""The policy that tune trains: on which images, in which blocks, for how long."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import write_digits
from helpers import backbone

import tokenenv
from agents.training.trainer import _Clock
from tokenenv.api import tune_training
from tokenenv.api.tune_training import train_policy
from tokenenv.data import open_source
from tokenenv.errors import UserError
from tokenenv.measure.opening import Model
from tokenenv.tuning.proposals import fitting
from tokenenv.tuning.trials import Trial

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_training_ends_after_its_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that goes on by a second whenever it is read."""
    read = iter(range(10_000))
    monkeypatch.setattr(_Clock, "seconds", lambda self: float(next(read)))
    run = tokenenv.train(
        "rl4evit", images=60, updates=50, minutes=0.1, batch=8, hidden=[8], epochs=1, minibatches=1,
        calibrate=0, blocks=[1, 4], evaluate_every=20, out="run",
    )  # fmt: skip
    assert 0 < run.report["updates"] < 10 and not run.stopped
    assert "saving" in run.report["history"][-1]  # the last policy was judged


def search(speeds: dict[str, float], losses: dict[str, float]) -> Any:
    trials = {what: Trial(what, 100, 0.1, 99, 0, 1, 2.0, speed) for what, speed in speeds.items()}
    return SimpleNamespace(
        backbone=backbone(), batch=4, budget=1.0, state=SimpleNamespace(trials=trials),
        expected=lambda: losses,
    )  # fmt: skip


WORDS = ["tome:r=4,blocks=1/3", "evit:keep=0.4,blocks=2", "resize:size=24"]


def test_it_aims_at_the_best_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    write_digits(Path("images"), 60)
    source = open_source("images", backbone().model)
    choosing, verifying = source.split(0.6, seed=0)
    seen: dict[str, Any] = {}

    def train(system: str, **given: Any) -> Any:
        root = Path(given["data"])
        files = {str(p.relative_to(root)) for p in root.rglob("*.png")}
        assert all((root / file).read_bytes() for file in files)  # links lead somewhere
        seen.update(given, system=system, files=files)
        return SimpleNamespace(stopped=False)

    monkeypatch.setattr(tune_training, "train", train)
    best = fitting(WORDS, backbone(), "digits_vit")
    known = search(dict(zip(WORDS, (1.25, 2.0, 3.0), strict=True)),
                   dict(zip(WORDS, (0.5, 1.5, 0.2), strict=True)))  # fmt: skip
    options: dict[str, Any] = {"seconds": 90.0, "seed": 5, "out": Path("policy")}
    found = train_policy(Model("digits_vit"), "images", known, best, choosing, **options)
    assert found == Path("policy")
    assert seen["files"] == set(choosing.files) and not seen["files"] & set(verifying.files)
    assert (seen["system"], seen["blocks"], seen["cost"]) == ("dora", (1, 3), "time")
    assert (seen["target_saving"], seen["cost_batch"], seen["minutes"]) == (20.0, 4, 1.5)
    over = search(dict.fromkeys(WORDS, 1.5), dict.fromkeys(WORDS, 1.5))
    with pytest.raises(UserError, match="no method was found within the budget"):
        train_policy(Model("digits_vit"), "images", over, best, choosing, **options)
    monkeypatch.setattr(tune_training, "train", lambda *a, **k: SimpleNamespace(stopped=True))
    with pytest.raises(KeyboardInterrupt):
        train_policy(Model("digits_vit"), "images", known, best, choosing, **options)


def test_a_finished_run_is_not_trained_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_training, "train", None)
    Path("policy").mkdir()
    Path("policy/policy.safetensors").touch()
    found = train_policy(
        replace(Model(), name="digits_vit"), None, search({}, {}), [], None,  # type: ignore[arg-type]
        seconds=1.0, seed=0, out=Path("policy"),
    )  # fmt: skip
    assert found == Path("policy")
