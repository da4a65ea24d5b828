"""Helpers for the examples that print tables: run each training once, and show the spread."""

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
    """Run ``tokenenv train`` in its own process unless it is finished; an interrupted one resumes.

    Args:
        where: the run folder; the output is written to ``log.txt`` there, the options to
            ``options.txt``.
        system: the system to train.
        options: options of the command other than ``--out`` and ``--resume``.

    Raises:
        SystemExit: the training failed, or the folder holds a run with other options.
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
        # One thread each: with more, runs in parallel slow each other down.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"training {where.name} failed: see {where / 'log.txt'}")


def settings(changed: list[str]) -> list[str]:
    """``KEY=VALUE`` words as options of the command."""
    return [word for setting in changed for word in ("--set", setting)]


def reports(folders: list[Path]) -> list[dict[str, Any]]:
    """The reports of the runs in these folders."""
    return [json.loads((folder / "report.json").read_text()) for folder in folders]


def saved(runs: list[dict[str, Any]]) -> str:
    """A table cell with the multiply-adds saved, percent."""
    return spread([100 * (1 - run["gmacs"] / run["gmacs_dense"]) for run in runs], ".1f")


def spread(values: list[float], form: str) -> str:
    """``mean [lowest, highest]`` as text."""
    mean, low, high = (format(f(values), form) for f in (statistics.mean, min, max))
    return f"{mean} [{low}, {high}]"
