"""Commands killed at random times once there are results: these stay, the rest comes out equal."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest
from helpers import FOLDERS, same

from agents.training.trainer import CHECKPOINT
from tokenenv.storage import LOCK, read_tensors

ROOT = Path(__file__).resolve().parents[1]
MOTHER = """
import json, os, sys
import matplotlib.figure, torch.utils.tensorboard
import agents.training.finetuning, agents.training.rl, tokenenv.api.compare, tokenenv.suite.run
from suite_tasks import TINY, TINY_MERGE
from tokenenv.cli.main import main
from tokenenv.suite.tasks import register_task

for task in (TINY, TINY_MERGE):
    register_task(task)
for line in sys.stdin:
    words, said = json.loads(line)
    pid = os.fork()
    if not pid:
        file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        code = 1
        try:
            code = main(words)
        finally:
            sys.stdout.flush()
            os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
"""Imports everything once, and forks a process for each command: importing takes longest."""

TRAIN = "--images 60 --set updates=6 --set evaluate_every=1 --set batch=8 --out"
LEARN = "--set epochs=1 --set minibatches=1 --set calibrate=2"
TUNE = "--set held_back=0.2"


@dataclass(frozen=True)
class Scene:
    """A command that goes on when it is given again.

    Attributes:
        words: the command, up to the folder that it writes to.
        first: pattern of the files of which the first is a result.
        again: what is added to go on.
    """

    words: str
    first: str = CHECKPOINT
    again: str = "--resume"


SCENES = {
    "rl4evit": Scene(f"train rl4evit {LEARN} --set hidden=8 {TRAIN}"),
    "dora": Scene(f"train dora {LEARN} --set hidden=8 {TRAIN}"),
    "dora-prune": Scene(f"train dora-prune {LEARN} --set critic_depth=1 {TRAIN}"),
    "mstm": Scene(f"train mstm {TUNE} {TRAIN}"),
    "evit": Scene(f"train evit {TUNE} {TRAIN}"),
    "rl4evit-finetune": Scene(f"train rl4evit-finetune {TUNE} --set policy=norm:keep=0.7 {TRAIN}"),
    "dynamicvit": Scene(f"train dynamicvit {TUNE} {TRAIN}"),
    "ltm": Scene(f"train ltm {TUNE} --set eta=5 {TRAIN}"),
    "compare": Scene(
        "compare tome:r=4|6|8 norm:keep=0.5|0.7 random:keep=0.5 --limit 100 --batch 1 --rounds 1 "
        "--out",
        "state/*.safetensors",
        "",
    ),
    "suite": Scene(
        "suite run tiny-prune-v0 tiny-merge-v0 --learner random --learner heuristic "
        "--learner untrained --seeds 0,1 --out",
        "results/*/*.json",
        "",
    ),
    "suite that trains": Scene(
        "suite run tiny-prune-v0 --learner mappo --learner ippo --seeds 0,1 --out",
        f"runs/*/{CHECKPOINT}",
        "",
    ),
}
KILLS = {name: 2 if name != "suite that trains" else 1 for name in SCENES} | {"suite": 1}
assert sum(KILLS.values()) == 20

TIMES = {"seconds", "dense_seconds", "training_seconds", "images_per_s", "images_per_s_dense"}
TIMES |= {"timing", "speeds"}
UNEQUAL = ("events.out", "train.log", "batch-", "table.md", "table.csv", "table.tex", "pareto.png")
UNEQUAL += ("report.html", LOCK)
"""Starts of the names of files that hold times, or the course of a process."""


class Mother:
    """The process of :data:`MOTHER`."""

    def __init__(self) -> None:
        folders = [ROOT, *(ROOT / "tests" / folder for folder in FOLDERS)]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, folders)),
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", MOTHER], env=environment, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def start(self, scene: Scene, out: Path, again: bool) -> Child:
        """Start a scene's command."""
        assert self.process.stdin is not None and self.process.stdout is not None
        words = [*scene.words.split(), str(out), *(scene.again.split() if again else [])]
        said = out.with_suffix(".log")
        self.process.stdin.write(json.dumps([words, str(said)]) + "\n")
        self.process.stdin.flush()
        return Child(int(self.process.stdout.readline()), self.process.stdout, said)


class Child:
    """A command that runs."""

    def __init__(self, pid: int, told: IO[str], said: Path) -> None:
        self.pid, self.said = pid, said
        self._reader = threading.Thread(target=self._read, args=(told,), daemon=True)
        self._reader.start()

    def _read(self, told: IO[str]) -> None:
        self.code = int(told.readline())

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it ends, at most ``seconds``; whether it has."""
        self._reader.join(seconds)
        return not self._reader.is_alive()

    def finish(self) -> None:
        """Wait until it ends well."""
        self.wait()
        assert self.code == 0, self.said.read_text()

    def kill(self) -> bool:
        """Kill it; whether it still ran."""
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(self.pid, signal.SIGKILL)
        self.wait()
        assert self.code in (0, -signal.SIGKILL), self.said.read_text()
        return self.code != 0


@pytest.fixture(scope="module")
def mother() -> Iterator[Mother]:
    made = Mother()
    yield made
    made.process.communicate()


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(one) for key, one in value.items() if key not in TIMES}
    return [without_times(one) for one in value] if isinstance(value, list) else value


def read(path: Path) -> Any:
    """What a file holds, without times."""
    if path.suffix == ".json":
        return without_times(json.loads(path.read_text()))
    if path.suffix == ".safetensors" and (path.name == CHECKPOINT or path.parent.name == "state"):
        tensors, said = read_tensors(path)
        return [tensors, without_times(said)]
    return path.read_bytes()


def settled(out: Path) -> Iterator[tuple[str, Any]]:
    """The files in a folder that have to come out the same, with what they hold."""
    for path in sorted(out.rglob("*")):
        left = path.name.startswith(".") and path.suffix == ".part"  # by what was killed
        if path.is_file() and not left and not path.name.startswith(UNEQUAL):
            yield str(path.relative_to(out)), read(path)


class Unbroken:
    """A run that nothing interrupts: its files, and how long it takes after its first result."""

    def __init__(self, mother: Mother, scene: Scene, out: Path) -> None:
        child = mother.start(scene, out, again=False)
        wait_for_a_result(child, scene, out, {})
        first = time.monotonic()
        child.finish()
        self.rest = time.monotonic() - first
        self.files = dict(settled(out))


def written(scene: Scene, out: Path) -> dict[Path, int]:
    """When each result was written."""
    return {path: path.stat().st_mtime_ns for path in out.glob(scene.first)}


def wait_for_a_result(child: Child, scene: Scene, out: Path, before: dict[Path, int]) -> None:
    while not child.wait(0.01) and written(scene, out) == before:
        pass


def killed(mother: Mother, scene: Scene, out: Path, delay: float, again: bool) -> bool:
    """Kill a command ``delay`` seconds after its first new result; whether it still ran."""
    before = written(scene, out)
    child = mother.start(scene, out, again)
    wait_for_a_result(child, scene, out, before)
    if child.wait(delay):
        child.finish()
        return False
    return child.kill()


def done(out: Path) -> dict[Path, Any]:
    """The results that exist, byte by byte; of a training the rows of its history."""
    found: dict[Path, Any] = {
        path: read_tensors(path)[1]["history"] for path in out.rglob(CHECKPOINT)
    }
    for pattern in ("state/*.safetensors", "results/*/*.json"):
        found |= {path: path.read_bytes() for path in out.glob(pattern)}
    return found


def check(mother: Mother, name: str, kills: int, tmp_path: Path) -> None:
    """Kill a command some times, go on after each, and compare with a run that was let be."""
    scene, chance = SCENES[name], random.Random(name)
    unbroken, landed, tries = Unbroken(mother, scene, tmp_path / "unbroken"), 0, 0
    assert unbroken.files
    out, again = tmp_path / "broken-0", False
    while landed < kills:
        tries += 1
        assert tries <= kills + 6, "it ends before it can be killed"
        delay = chance.random() * unbroken.rest / tries
        kept = done(out)
        if not killed(mother, scene, out, delay, again):  # too late: from the start
            assert dict(settled(out)).keys() == unbroken.files.keys()
            out, again = tmp_path / f"broken-{tries}", False
            continue
        landed, again = landed + 1, True
        stays(kept, done(out))
    kept = done(out)
    assert kept
    mother.start(scene, out, again).finish()
    stays(kept, done(out))
    files = dict(settled(out))
    assert files.keys() == unbroken.files.keys()
    for file, content in unbroken.files.items():
        assert same(files[file], content), file


def stays(before: dict[Path, Any], after: dict[Path, Any]) -> None:
    """What was there before is there now, unchanged, if it is a history as its start."""
    for path, content in before.items():
        assert after[path][: len(content)] == content, path


def test_a_killed_command_goes_on(mother: Mother, tmp_path: Path) -> None:
    check(mother, "compare", 1, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENES)
def test_commands_killed_at_random_times_go_on(name: str, mother: Mother, tmp_path: Path) -> None:
    check(mother, name, KILLS[name], tmp_path)
