"""A training run's folder, and what all trainings put into it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, TypeVar

from agents.systems.settings import preset, with_settings
from agents.training.trainer import CHECKPOINT, Trainer
from agents.workers import Workers, join
from tokenenv.cli.common import writable_folder
from tokenenv.data import ImageSource, open_source
from tokenenv.errors import UserError
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.load import RANDOM, Dense

POLICY = "policy.safetensors"
MODEL = "model.safetensors"
"""Only where the backbone was fine-tuned."""
INTERRUPTED = 130


class Launched(Protocol):
    """What every process builds for a training."""

    @property
    def trainer(self) -> Trainer:
        """What trains."""


_Run = TypeVar("_Run", bound=Launched)


def launch(
    args: argparse.Namespace,
    system: Any,
    build: Callable[[argparse.Namespace, Any, Workers, Path], _Run],
    train: Callable[[argparse.Namespace, _Run, Path], None],
) -> int:
    """Build and run a training in this process, or in those that ``torchrun`` started.

    Args:
        args: of the command.
        system: class of its settings.
        build: makes everything from arguments, settings, processes and run folder.
        train: trains and reports.

    Returns:
        The exit status, 130 after Ctrl-C.
    """
    config = with_settings(preset(system, args.model), args.settings)
    with (
        join(args.device) as (workers, args.device),
        workers.quiet(),
        contextlib.ExitStack() as stack,
    ):
        with workers.together():
            # Where several train, the others never write.
            out = Path(args.out or ".") if workers.rank else stack.enter_context(run_folder(args))
            run = build(args, config, workers, out)
        with resumable(out):
            train(args, run, out)
    # torchrun ends the first process, which still reports, where another one fails.
    return INTERRUPTED if run.trainer.stopped and not workers.rank else 0


def open_images(args: argparse.Namespace, backbone: Backbone | Dense) -> ImageSource:
    """The training images that ``--data`` and ``--images`` ask for."""
    source = open_source(args.data, backbone.model, split="train")
    if args.images is None:
        return source
    if args.images > len(source):
        raise UserError(
            f"--images {args.images} is more than the {len(source)} images of {source.name}: "
            "ask for fewer, or leave it out to use them all"
        )
    return source.subset(args.images, args.seed)


def final_images(
    args: argparse.Namespace, backbone: Backbone | Dense, held_back: ImageSource
) -> ImageSource:
    """The embedded digits have images that nobody trains on; of a folder, the held-back part."""
    if args.data in (None, "digits"):
        return open_source(args.data, backbone.model, split="test")
    return held_back


@contextlib.contextmanager
def run_folder(args: argparse.Namespace) -> Iterator[Path]:
    """The folder to write to: new and writable, or the one to resume."""
    if args.out is None:
        if args.resume:
            raise UserError("--resume needs --out DIR: which run shall go on?")
        with _new_folder(Path("runs"), args.system) as out:
            yield out
        return
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out '{out}' is a file: choose a folder")
    if not args.resume and any((out / name).exists() for name in (CHECKPOINT, POLICY)):
        raise UserError(f"--out '{out}' already holds a run: add --resume, or choose another")
    with writable_folder(out):
        yield out


@contextlib.contextmanager
def resumable(out: Path) -> Iterator[None]:
    """Where Ctrl-C ends what is done here, say how it goes on, if it can."""
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
            yield out
        finally:
            with contextlib.suppress(OSError):  # not empty
                out.rmdir()


def description(
    args: argparse.Namespace, config: Any, name: str, source: ImageSource
) -> dict[str, Any]:
    """What the run is, as JSON; a run is only resumed under the same description."""
    weights = args.weights
    if weights not in (None, RANDOM):
        weights = os.path.abspath(weights)
    return {
        "system": args.system,
        "model": name,
        "weights": weights,
        "data": source.name,
        "images": len(source),
        "seed": args.seed,
        "dtype": args.dtype,
        **json.loads(json.dumps(dataclasses.asdict(config))),
    }


def versions() -> dict[str, str]:
    """Of Python and the packages that a run depends on."""
    found = {"python": platform.python_version()}
    for name in ("tokenenv", "torch", "timm", "gymnasium", "pettingzoo"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@contextlib.contextmanager
def events(out: Path, trainer: Trainer) -> Iterator[Any]:
    """A function that writes numbers as TensorBoard events, in the first of several processes."""
    if trainer.workers.rank:
        yield lambda update, numbers: None
        return
    from torch.utils.tensorboard import SummaryWriter

    # What was written after the checkpoint that this run goes on from will be written again.
    writer = SummaryWriter(str(out), purge_step=trainer.done + 1 if trainer.history else 0)

    def log(update: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, update)

    with contextlib.closing(writer):
        yield log
