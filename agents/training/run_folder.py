"""The folder of a training run, and the files that all kinds of training write to it."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from agents.policies import POLICY
from agents.training.judgement import Judgement
from agents.training.request import Request
from agents.training.run import CONFIG
from agents.training.trainer import CHECKPOINT, Trainer
from tokenenv.errors import UserError
from tokenenv.storage import own_folder, writable_folder, write_json


@contextlib.contextmanager
def run_folder(request: Request) -> Iterator[Path]:
    """The folder to write to: new and writable, or the one to resume; locked for this process.

    Raises:
        UserError: the folder holds a run and ``resume`` is not set, it can't be written to, or
            another process is writing to it.
    """
    out = request.out
    if out is None:
        if request.resume:
            raise UserError("--resume needs --out DIR: which run shall go on?")
        with _new_folder(Path("runs"), re.sub(r"[^\w-]+", "-", request.system.name)) as out:
            yield out
        return
    if out.exists() and not out.is_dir():
        raise UserError(f"--out '{out}' is a file: choose a folder")
    with own_folder(out):
        if not request.resume and any((out / name).exists() for name in (CHECKPOINT, POLICY)):
            raise UserError(f"--out '{out}' already holds a run: add --resume, or choose another")
        yield out


@contextlib.contextmanager
def resumable(out: Path) -> Iterator[None]:
    """After Ctrl-C, add to the interrupt how the run is resumed, if there is a checkpoint."""
    try:
        yield
    except KeyboardInterrupt:
        if not (out / CHECKPOINT).exists():
            raise
        raise KeyboardInterrupt(f"the same command with --out {out} --resume goes on") from None


@contextlib.contextmanager
def _new_folder(parent: Path, name: str) -> Iterator[Path]:
    """The first free ``parent/name-NUMBER``; runs started at the same time get different ones."""
    with writable_folder(parent):
        number = 0
        while True:
            out = parent / f"{name}-{number}"
            try:
                out.mkdir()
                break
            except FileExistsError:
                number += 1
        try:
            with own_folder(out):
                yield out
        finally:
            with contextlib.suppress(OSError):  # not empty
                out.rmdir()


def write_config(out: Path, request: Request, trainer: Trainer) -> dict[str, Any]:
    """The run's description with versions; the first process writes it to ``config.json``."""
    origin = {"origin": request.system.origin} if request.system.origin else {}
    config = {**trainer.config, **origin, "versions": versions()}
    if not trainer.workers.rank:
        write_json(out / CONFIG, config)
    return config


def progress_json(trainer: Trainer, kept: Judgement) -> dict[str, Any]:
    """The part of a report about the training; ``kept``: the judgement of the result."""
    return {
        "updates": trainer.done,
        "stopped_early": trainer.stopped,
        "training_seconds": round(trainer.seconds, 1),
        "held_back": dataclasses.asdict(kept),
        "macs": "GMACs per image, policy included; 1 MAC = 1 FLOP",
        "history": trainer.history,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a run depends on, by name."""
    found = {"python": platform.python_version()}
    for name in ("tokenenv", "torch", "timm", "gymnasium", "pettingzoo"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@contextlib.contextmanager
def events(out: Path, trainer: Trainer) -> Iterator[Any]:
    """A function ``log(update, numbers)`` that writes TensorBoard events in the first process."""
    if trainer.workers.rank:
        yield lambda update, numbers: None
        return
    from torch.utils.tensorboard import SummaryWriter

    # Events written after the checkpoint that this run resumes from are written again.
    writer = SummaryWriter(str(out), purge_step=trainer.done + 1 if trainer.history else 0)

    def log(update: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, update)

    with contextlib.closing(writer):
        yield log
