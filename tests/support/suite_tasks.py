"""Two small tasks for tests of the suite, and its command."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tokenenv.cli.main import main
from tokenenv.suite.tasks import TASKS, Task, find_task, register_task

TINY = dataclasses.replace(
    find_task("digits-prune-v0"),
    name="tiny-prune-v0", test_images=40, budget=256, seeds=2, grid=(0.5, 0.2), low=0.26,
)  # fmt: skip
TINY_MERGE = dataclasses.replace(
    find_task("digits-merge-v0"), name="tiny-merge-v0", test_images=40, budget=192, seeds=2,
    grid=(8, 16),
)  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of its own, and two small tasks more."""
    monkeypatch.chdir(tmp_path)
    known = list(TASKS)
    for task in (TINY, TINY_MERGE):
        register_task(task)
    yield
    TASKS[:] = known


def run(command: str) -> int:
    return main(shlex.split(f"suite {command}"))


def kept(task: Task = TINY) -> dict[str, dict[str, Any]]:
    folder = Path("suite/results", task.name)
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
