"""Trainings that examples repeat: done once, gone on with, and never taken for another's."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, with a command that leaves what a training does, stopped or finished."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "examples")
    module = importlib.import_module("repeated")
    module.commands, module.stopped = [], False

    def run(command: list[str], **options: object) -> SimpleNamespace:
        module.commands.append(command)
        out = Path(command[command.index("--out") + 1])
        (out / "report.json").write_text(json.dumps({"stopped_early": module.stopped}))
        (out / "checkpoint.safetensors").touch()
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(module.subprocess, "run", run)
    return module


def test_what_is_done_is_not_done_again(repeated: ModuleType, tmp_path: Path) -> None:
    for _ in range(2):
        repeated.train(tmp_path / "a", "mstm", ["--set", "keep=0.5"])
    assert len(repeated.commands) == 1


def test_what_was_stopped_goes_on(repeated: ModuleType, tmp_path: Path) -> None:
    repeated.stopped = True
    repeated.train(tmp_path / "a", "mstm", [])
    repeated.stopped = False
    repeated.train(tmp_path / "a", "mstm", [])
    assert ["--resume" in command for command in repeated.commands] == [False, True]


def test_another_training_is_not_taken_for_this_one(repeated: ModuleType, tmp_path: Path) -> None:
    repeated.train(tmp_path / "a", "mstm", ["--set", "keep=0.3"])
    with pytest.raises(SystemExit, match=r"keep=0\.3': give another --out"):
        repeated.train(tmp_path / "a", "mstm", ["--set", "keep=0.9"])
