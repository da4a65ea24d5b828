"""``tokenenv train`` of the methods that train the backbone; ``torchrun`` starts it on many."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch
from tqdm import tqdm

from agents.finetune.augment import augmentation
from agents.finetune.config import FineTuneConfig
from agents.finetune.student import Trainee
from agents.finetune.tuner import FineTuner
from agents.systems.registry import FINE_TUNED
from agents.training.held_back import HeldBack
from agents.training.plots import plot_history
from agents.training.run_folder import (
    description,
    events,
    final_images,
    launch,
    open_images,
    versions,
)
from agents.training.trainer import Trainer
from agents.workers import Workers
from tokenenv.cli.common import (
    evaluation_bar,
    evaluation_json,
    open_backbone,
    open_dense,
    parameters_json,
    print_parameters,
    print_result,
    report_skipped,
)
from tokenenv.data import ImageSource, Stream
from tokenenv.errors import UserError
from tokenenv.storage import write_json
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.load import Dense

_STATISTICS = 1000
_PER_CLASS = 4
"""Training images, at most, that LTM's bound takes its statistics of: the larger number."""


def finetune(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status, 130 after Ctrl-C."""
    return launch(args, FINE_TUNED[args.system](), _build, _train)


@dataclasses.dataclass
class _Run:
    """What every process builds.

    Attributes:
        name: of the model.
        source: all training images.
        teacher: the untouched model; ``student``: what is trained, by ``trainer``.
        judge: measures it on images that nobody trains on.
    """

    name: str
    source: ImageSource
    teacher: Backbone | Dense
    student: Trainee
    judge: HeldBack
    trainer: Trainer


def _build(args: argparse.Namespace, config: FineTuneConfig, workers: Workers, out: Path) -> _Run:
    if args.dtype != "float32":
        raise UserError(
            f"fine-tuning keeps its weights in float32, not {args.dtype}: leave --dtype out, and "
            "use --set amp=bfloat16 or amp=float16 for mixed precision"
        )
    teacher, name = open_dense(args) if config.any_family else open_backbone(args)
    source = open_images(args, teacher)
    fit, held_back = source.split(config.held_back, seed=args.seed)
    parts = workers.count * config.accumulate
    if config.batch % parts or config.batch > len(fit):
        raise UserError(
            f"batch={config.batch} must fall into {parts} equal parts (processes x accumulate) and "
            f"be at most {len(fit)}, the images to train on"
        )
    if (config.mixup or config.cutmix) and config.batch // parts % 2:
        raise UserError(
            f"mixup and cutmix pair images, and batch={config.batch} gives {config.batch // parts} "
            "at a time: choose an even number"
        )
    torch.manual_seed(args.seed)
    student = config.student(teacher, name).to(teacher.device)
    share = fit.share(workers.rank, workers.count)
    augment = augmentation(
        teacher.model,
        source.shape,
        crop=config.crop,
        hflip=config.hflip,
        auto_augment=config.auto_augment,
    )
    order = Stream(share.augmented(augment) if augment else share, config.batch // parts, args.seed)
    clean = fit.subset(max(_STATISTICS, _PER_CLASS * teacher.classes), args.seed)
    tuner = FineTuner(student, teacher, order, config, args.seed, workers, clean)
    judge = HeldBack(teacher, held_back, workers)
    trainer = Trainer(
        tuner,
        order,
        lambda trainee: judge.trainee(trainee, clean),
        out,
        updates=config.updates,
        evaluate_every=config.evaluate_every,
        target_saving=0.0,
        # Each process has images of its own: with another number an order can't be gone on with.
        config={
            **description(args, config, name, source),
            "frozen": False,
            "processes": workers.count,
        },
        shown="loss",
        workers=workers,
    )
    if args.resume:
        trainer.resume()
    return _Run(name, source, teacher, student, judge, trainer)


def _train(args: argparse.Namespace, run: _Run, out: Path) -> None:
    """Train and report."""
    trainer, held_back = run.trainer, run.judge.source
    workers = trainer.workers
    count = f", {workers.count} processes" if workers.count > 1 else ""
    print(
        f"fine-tuning {run.name} for {args.system}: {len(run.source) - len(held_back)} images "
        f"of {run.source.name}, {len(held_back)} held back to compare weights{count}; "
        "Ctrl-C stops early and keeps the best"
    )
    for _ in run.judge.prepare():
        pass
    held_back.check_readable()
    if not workers.rank:
        write_json(out / "config.json", {**trainer.config, "versions": versions()})
    with events(out, trainer) as log:
        trainer.run(log)
    if workers.rank:
        return
    report_skipped(run.source)
    _finish(args, run, trainer, out)


def _finish(args: argparse.Namespace, run: _Run, trainer: Trainer, out: Path) -> None:
    """Keep the best weights, and write what the run folder promises."""
    assert trainer.best is not None
    student, held_back = run.student, run.judge.source
    student.load_state_dict(trainer.best_state)
    student.eval()
    final = final_images(args, run.teacher, held_back)
    student.write(out, final)
    with evaluation_bar(final) as progress:
        result = student.measured(final, run.teacher, progress=progress)
    report = {
        **evaluation_json(run.name, final, result),
        **(counts := parameters_json(student, run.teacher)),
        "updates": trainer.done,
        "stopped_early": trainer.stopped,
        "training_seconds": round(trainer.seconds, 1),
        "held_back": dataclasses.asdict(trainer.best),
        "evaluated_on_held_back": final is held_back,
        "frozen": False,
        "macs": "GMACs per image, policy included; 1 MAC = 1 FLOP",
        "history": trainer.history,
    }
    write_json(out / "report.json", report)
    plot_history(out / "curve.png", trainer.history, None, shown="loss")
    print_result(final, result, frozen=False)
    print_parameters(counts)
    bounds = [row["bound"] for row in trainer.history if "bound" in row]
    if bounds:
        print(f"  bound on the information bottleneck: {bounds[0]:.3f} -> {bounds[-1]:.3f} nats")
    if final is held_back:
        print("  the weights were chosen on these images: evaluate on others for a fair number")
    print(
        f"fine-tuned {trainer.done} updates in {tqdm.format_interval(trainer.seconds)}; "
        f"{', '.join(student.files)}, report.json and curve.png are in {out}"
    )
