"""``tokenenv train`` of the methods that train the backbone; ``torchrun`` starts it on many."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
from pathlib import Path

import torch
from tqdm import tqdm

from agents.finetune.augment import augmentation
from agents.finetune.config import FineTuneConfig
from agents.finetune.student import Trainee
from agents.finetune.tuner import FineTuner
from agents.finetune.workers import Workers, join
from agents.judgement import Judgement
from agents.plots import plot_history
from agents.settings import with_settings
from agents.storage import write_json
from agents.systems import FINE_TUNED
from agents.training import Follower, Trainer
from tokenenv.backbone import Backbone
from tokenenv.commands.common import (
    evaluation_bar,
    evaluation_json,
    open_backbone,
    open_dense,
    parameters_json,
    print_parameters,
    print_result,
    report_skipped,
)
from tokenenv.commands.run_folder import (
    INTERRUPTED,
    description,
    events,
    final_images,
    open_images,
    resumable,
    run_folder,
    versions,
)
from tokenenv.data import ImageSource, Stream
from tokenenv.errors import UserError
from tokenenv.models import EMBEDDED, Dense

_STATISTICS = 1000
_PER_CLASS = 4
"""Training images, at most, that LTM's bound takes its statistics of: the larger number."""


def finetune(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status, 130 after Ctrl-C."""
    system = FINE_TUNED[args.system]()
    preset = system() if args.model not in (None, EMBEDDED) else system.for_digits()
    config: FineTuneConfig = with_settings(preset, args.settings)
    with join(args.device) as (workers, args.device):
        if workers.rank:
            with contextlib.redirect_stdout(io.StringIO()):  # the first process says it all
                return INTERRUPTED if _follow(args, config, workers) else 0
        with run_folder(args) as out, resumable(out):
            stopped = _lead(args, config, workers, out)
    return INTERRUPTED if stopped else 0


@dataclasses.dataclass
class _Run:
    """What every process builds.

    Attributes:
        name: of the model.
        source: all training images; ``held_back``: those of them that nobody trains on; ``clean``:
            some of the others, for statistics.
        teacher: the untouched model.
        tuner: what trains; ``order``: of this process's images.
    """

    name: str
    source: ImageSource
    held_back: ImageSource
    clean: ImageSource
    teacher: Backbone | Dense
    tuner: FineTuner
    order: Stream


def _build(args: argparse.Namespace, config: FineTuneConfig, workers: Workers) -> _Run:
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
    return _Run(name, source, held_back, clean, teacher, tuner, order)


def _follow(args: argparse.Namespace, config: FineTuneConfig, workers: Workers) -> bool:
    """Train along with the first process; whether it was stopped."""
    run = _build(args, config, workers)
    follower = Follower(run.tuner, run.order, config.updates, workers.agree)
    if args.resume:
        follower.resume(Path(args.out or "."))
    return follower.run()


def _lead(args: argparse.Namespace, config: FineTuneConfig, workers: Workers, out: Path) -> bool:
    """Build everything, train, and report; whether Ctrl-C ended the training early."""
    run = _build(args, config, workers)
    judge = _Judge(run.teacher, run.held_back, run.clean)
    trainer = Trainer(
        run.tuner,
        run.order,
        judge,
        out,
        updates=config.updates,
        evaluate_every=config.evaluate_every,
        target_saving=0.0,
        config={**description(args, config, run.name, run.source), "frozen": False},
        shown="loss",
        agree=workers.agree,
    )
    if args.resume:
        trainer.resume()
    count = f", {workers.count} processes" if workers.count > 1 else ""
    print(
        f"fine-tuning {run.name} for {args.system}: {len(run.source) - len(run.held_back)} images "
        f"of {run.source.name}, {len(run.held_back)} held back to compare weights{count}; "
        "Ctrl-C stops early and keeps the best"
    )
    judge.prepare()
    write_json(out / "config.json", {**trainer.config, "versions": versions()})
    with events(out, trainer) as log:
        trainer.run(log)
    report_skipped(run.source)
    _finish(args, run, trainer, out)
    return trainer.stopped


def _finish(args: argparse.Namespace, run: _Run, trainer: Trainer, out: Path) -> None:
    """Keep the best weights, and write what the run folder promises."""
    assert trainer.best is not None
    student = run.tuner.student
    student.load_state_dict(trainer.best_state)
    student.eval()
    final = final_images(args, run.teacher, run.held_back)
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
        "evaluated_on_held_back": final is run.held_back,
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
    if final is run.held_back:
        print("  the weights were chosen on these images: evaluate on others for a fair number")
    print(
        f"fine-tuned {trainer.done} updates in {tqdm.format_interval(trainer.seconds)}; "
        f"{', '.join(student.files)}, report.json and curve.png are in {out}"
    )


class _Judge:
    """Measures a student on held-back images whose dense predictions are known."""

    def __init__(self, teacher: Backbone | Dense, source: ImageSource, clean: ImageSource) -> None:
        self.teacher, self.source, self.clean = teacher, source, clean
        self._dense = torch.zeros(len(source), dtype=torch.long)

    @torch.inference_mode()
    def prepare(self) -> None:
        """Predict with the dense model, once."""
        for index in torch.arange(len(self.source)).split(64):
            batch = self.source.batch(index)
            if len(batch.index):
                images = batch.images.to(self.teacher.device, self.teacher.dtype)
                self._dense[batch.index] = self.teacher(images).argmax(1).cpu()
        self.source.check_readable()

    def __call__(self, student: Trainee) -> Judgement:
        """Saving, loss and drop with the student's weights as they are."""
        found = student.eval().measured(self.source, self.teacher, dense=self._dense)
        more = student.judged(self.clean, self.source)
        return Judgement(found.saving, found.losses.mean().item(), found.drop, **more)
