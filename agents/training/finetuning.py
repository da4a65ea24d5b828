"""Fine-tuning of a backbone together with the method that removes its tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from agents.finetune.augment import augmentation
from agents.finetune.config import FineTuneConfig
from agents.finetune.tuner import FineTuner
from agents.training.held_back import HeldBack
from agents.training.plots import CURVE, plot_history
from agents.training.request import Request
from agents.training.run import REPORT, Run
from agents.training.run_folder import events, progress_json, write_config
from agents.training.trainer import Trainer
from agents.workers import Workers
from tokenenv.data import ImageSource, Stream
from tokenenv.errors import UserError
from tokenenv.measure.printing import (
    evaluation_bar,
    evaluation_json,
    parameters_json,
    print_parameters,
    print_result,
    report_skipped,
)
from tokenenv.storage import write_json
from tokenenv.vit.dense import Dense

_STATISTICS = 1000
_PER_CLASS = 4
"""LTM's bound takes its statistics of at most ``max(_STATISTICS, _PER_CLASS * classes)`` images."""


class FineTuning:
    """A fine-tuning run. Every process builds one; only the first writes the report.

    Args:
        request: the arguments of ``train``.
        config: the settings of the system.
        workers: the processes that train together.
        out: run folder.

    Raises:
        UserError: the settings don't fit the model, the images or the number of processes.
    """

    def __init__(
        self, request: Request, config: FineTuneConfig, workers: Workers, out: Path
    ) -> None:
        self.request, self.config, self.workers, self.out = request, config, workers, out
        if request.model.dtype != "float32":
            raise UserError(
                f"fine-tuning keeps its weights in float32, not {request.model.dtype}: leave "
                "--dtype out, and use --set amp=bfloat16 or amp=float16 for mixed precision"
            )
        open_teacher = (
            request.model.open_dense if config.any_family else request.model.open_backbone
        )
        self.teacher: Dense = open_teacher(request.data)
        self.source = request.training_images(self.teacher)
        fit, held_back = request.divide(self.source)
        check_batch(config, len(fit), workers.count)
        torch.manual_seed(request.seed)
        student = config.student(self.teacher, request.model.name)
        self.student = student.to(self.teacher.device)
        order = self._order(fit)
        clean = fit.subset(max(_STATISTICS, _PER_CLASS * self.teacher.classes), request.seed)
        self.judge = HeldBack(self.teacher, held_back, workers)
        self.trainer = Trainer(
            FineTuner(self.student, self.teacher, order, config, request.seed, workers, clean),
            order,
            lambda trainee: self.judge.trainee(trainee, clean),
            out,
            updates=config.updates,
            evaluate_every=config.evaluate_every,
            target_saving=0.0,
            # Each process trains on its own part of the images, so a run can only be resumed with
            # the same number of processes.
            config={
                **request.description(self.source),
                "frozen": False,
                "processes": workers.count,
            },
            shown="loss",
            after_update=request.after_update,
            workers=workers,
        )
        if request.resume:
            self.trainer.resume()

    def _order(self, fit: ImageSource) -> Stream:
        """Batches of this process's share of the training images, augmented."""
        config, workers = self.config, self.workers
        augment = augmentation(
            self.teacher.model,
            self.source.shape,
            crop=config.crop,
            hflip=config.hflip,
            auto_augment=config.auto_augment,
        )
        share = fit.share(workers.rank, workers.count)
        size = config.batch // (workers.count * config.accumulate)
        return Stream(share.augmented(augment) if augment else share, size, self.request.seed)

    def run(self) -> Run:
        """Train, keep the best weights, and report."""
        held_back, count = self.judge.source, self.workers.count
        together = f", {count} processes" if count > 1 else ""
        print(
            f"fine-tuning {self.request.model.name} for {self.request.system.name}: "
            f"{len(self.source) - len(held_back)} images of {self.source.name}, {len(held_back)} "
            f"held back to compare weights{together}; Ctrl-C stops early and keeps the best"
        )
        self.judge.prepare()
        config = write_config(self.out, self.request, self.trainer)
        with events(self.out, self.trainer) as log:
            self.trainer.run(log)
        if self.workers.rank:
            return Run(self.out, config, trust=True)
        report_skipped(self.source)
        return Run(self.out, config, self._report(), trust=True)  # its code has run here

    def _report(self) -> dict[str, Any]:
        """Write weights, report and picture, print the result, and return the report."""
        student, trainer, out = self.student, self.trainer, self.out
        held_back = self.judge.source
        assert trainer.best is not None
        student.load_state_dict(trainer.best_state)
        student.eval()
        final = self.request.final_images(self.teacher, held_back)
        student.write(out, final)
        with evaluation_bar(final) as progress:
            result = student.measured(final, self.teacher, progress=progress)
        counts = parameters_json(student, self.teacher)
        report = {
            **evaluation_json(self.request.model.name, final, result),
            **counts,
            **progress_json(trainer, trainer.best),
            "evaluated_on_held_back": final is held_back,
            "frozen": False,
        }
        write_json(out / REPORT, report)
        plot_history(
            out / CURVE,
            trainer.history,
            None,
            shown="loss",
            title=f"{self.request.system.name} on {self.request.model.name}, seed "
            f"{self.request.seed}",
        )
        print_result(final, result, frozen=False)
        print_parameters(counts["parameters"], counts["parameters_dense"])
        bounds = [row["bound"] for row in trainer.history if "bound" in row]
        if bounds:
            print(
                f"  bound on the information bottleneck: {bounds[0]:.3f} -> {bounds[-1]:.3f} nats"
            )
        if final is held_back:
            print("  the weights were chosen on these images: evaluate on others for a fair number")
        print(
            f"fine-tuned {trainer.done} updates in {tqdm.format_interval(trainer.seconds)}; "
            f"{', '.join(student.files)}, {REPORT} and {CURVE} are in {out}"
        )
        return report


def check_batch(config: FineTuneConfig, images: int, processes: int) -> None:
    """Raise :class:`UserError` unless ``batch`` images can be drawn, divided and, if asked, mixed.

    Args:
        config: the settings of the system.
        images: number of images to train on.
        processes: number of processes that train together.
    """
    parts = processes * config.accumulate
    if config.batch % parts or config.batch > images:
        raise UserError(
            f"batch={config.batch} must fall into {parts} equal parts (processes x accumulate) and "
            f"be at most {images}, the images to train on"
        )
    if (config.mixup or config.cutmix) and config.batch // parts % 2:
        raise UserError(
            f"mixup and cutmix pair images, and batch={config.batch} gives {config.batch // parts} "
            "at a time: choose an even number"
        )
