"""What the tables of these examples share: trainings that are done once, and their spread."""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any


def train(where: Path, system: str, options: list[str]) -> None:
    """``tokenenv train`` in a process of its own, unless it is done; a broken one goes on.

    Args:
        where: the run folder; what is printed goes to ``log.txt`` there, and the options to
            ``options.txt``.
        system: what is trained.
        options: of the command, but ``--out`` and ``--resume``.

    Raises:
        SystemExit: the training failed, or what lies there was trained with other options.
    """
    where.mkdir(parents=True, exist_ok=True)
    words, known = shlex.join([system, *options]), where / "options.txt"
    if known.exists() and known.read_text() != words:
        raise SystemExit(f"{where} holds a training of '{known.read_text()}': give another --out")
    known.write_text(words)
    report = where / "report.json"
    if report.exists() and not json.loads(report.read_text())["stopped_early"]:
        return
    command = [sys.executable, "-m", "tokenenv", "train", system, "--out", str(where), *options]
    if (where / "checkpoint.safetensors").exists():
        command.append("--resume")
    with open(where / "log.txt", "a") as log:
        # One thread each: with more, runs beside each other wait for each other.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"training {where.name} failed: see {where / 'log.txt'}")


def settings(changed: list[str]) -> list[str]:
    """``KEY=VALUE`` words as options of the command."""
    return [word for setting in changed for word in ("--set", setting)]


def reports(folders: list[Path]) -> list[dict[str, Any]]:
    """What the runs in these folders came to."""
    return [json.loads((folder / "report.json").read_text()) for folder in folders]


def saved(runs: list[dict[str, Any]]) -> str:
    """Multiply-adds saved, percent, as a cell."""
    return spread([100 * (1 - run["gmacs"] / run["gmacs_dense"]) for run in runs], ".1f")


def spread(values: list[float], form: str) -> str:
    """``mean [lowest, highest]``."""
    mean, low, high = (format(f(values), form) for f in (statistics.mean, min, max))
    return f"{mean} [{low}, {high}]"
