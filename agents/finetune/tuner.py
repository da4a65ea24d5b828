"""The fine-tuning loop, the same for all methods: one update at a time."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from agents.finetune.config import FineTuneConfig
from agents.finetune.losses import logit_loss
from agents.finetune.student import Trainee
from agents.restoring import restore
from agents.workers import ALONE, Workers
from tokenenv.artefact import Unfit, Within, fits
from tokenenv.data import Batch, ImageSource
from tokenenv.errors import UserError
from tokenenv.vit.dense import Dense


class Batches(Protocol):
    """Endless batches of labelled images, such as :class:`tokenenv.data.Stream`."""

    def next(self) -> Batch:
        """The next batch."""


class FineTuner:
    """Trains a student on labels and by distillation from its dense teacher.

    The loss is cross entropy + KL to the teacher's logits + the student's own terms, such as the
    squared error between kept tokens and the teacher's (DynamicViT, Rao et al., NeurIPS 2021,
    equation 16), weighted by ``config``. Optimiser, schedule, mixup and moving average are timm's.

    The random numbers of an update depend on the seed and the update's number only, so a run
    resumed from :meth:`state_dict` continues exactly.

    Args:
        student: the model to train, in place.
        teacher: the dense model, frozen.
        batches: batches of ``batch / (processes x accumulate)`` images, possibly augmented.
        config: the settings.
        seed: seed of all random numbers.
        workers: the processes that train together.
        clean: training images without augmentation, the same in every process; only for a student
            that computes statistics of them.

    Attributes:
        policy: the student with the moving average of the weights, which is evaluated and saved.
        done: updates so far.

    Raises:
        UserError: timm does not know the optimiser, or the device does not have the precision.
    """

    def __init__(
        self,
        student: Trainee,
        teacher: Dense,
        batches: Batches,
        config: FineTuneConfig,
        seed: int,
        workers: Workers = ALONE,
        clean: ImageSource | None = None,
    ) -> None:
        self.workers = workers
        self.student, self.teacher, self.batches = student, teacher, batches
        self.config, self.seed, self.done, self.clean = config, seed, 0, clean
        self._device = student.device
        self._half = half_precision(config.amp, self._device)
        self._optimizer = _optimizer(student, config)
        self._schedule = CosineLRScheduler(
            self._optimizer,
            config.updates,
            lr_min=config.min_lr,
            warmup_t=round(config.warmup * config.updates),
            t_in_epochs=False,
        )
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=self._half is torch.float16)
        self._mixup = None
        if config.mixup or config.cutmix:
            self._mixup = Mixup(
                config.mixup,
                config.cutmix,
                label_smoothing=config.smoothing,
                num_classes=teacher.classes,
            )
        self._ema = ModelEmaV3(student, config.ema, use_warmup=True)

    # Cached at the first update, not set before: an exchange in __init__ would leave the other
    # processes waiting if this one still fails while it is set up.
    @cached_property
    def _wrapped(self) -> nn.Module:
        return self.workers.wrap(self.student)

    @property
    def policy(self) -> nn.Module:
        """The student with the moving average of the weights."""
        averaged: nn.Module = self._ema.module
        return averaged

    def update(self) -> dict[str, float]:
        """One optimiser step; returns means over this process's images, by name.

        Raises:
            UserError: the loss is not finite.
        """
        config, parts = self.config, self.config.accumulate
        if self.clean is not None:
            self.student.before(self.done, self.clean, config)
        self.student.train()
        self._schedule.step_update(self.done)
        seen: list[dict[str, Tensor]] = []
        with _drawing(self.seed, self.done, self.workers.rank, self._device):
            for part in range(parts):
                batch = self.batches.next()
                with self.workers.alone(self._wrapped, part < parts - 1):
                    loss, numbers = self._loss(batch)
                    self._scaler.scale(loss / parts).backward()
                seen.append(numbers)
        self._scaler.unscale_(self._optimizer)
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), config.clip)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        self.done += 1
        self._ema.update(self.student, self.done)
        # All in one transfer, as each one synchronises with an accelerator.
        rows = torch.stack([torch.stack([*numbers.values(), norm]) for numbers in seen])
        means = dict(zip([*seen[0], "gradient_norm"], rows.mean(0).tolist(), strict=True))
        if self.workers.agree(not math.isfinite(means["loss"])):
            raise self.workers.mistake(
                f"training diverged (loss {means['loss']:g}): use a smaller learning rate"
            )
        return {**means, "lr": self._optimizer.param_groups[0]["lr"]}

    def _loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        config, device = self.config, self._device
        images = batch.images.to(device, self.student.dtype)
        labels = batch.labels.to(device)
        target, classify = labels, _hard_loss(config.smoothing)
        if self._mixup is not None:
            images, target = self._mixup(images, labels)
            classify = SoftTargetCrossEntropy()
        with self._precision():
            with torch.no_grad():
                dense = self.teacher.model.forward_features(images)
                dense_logits = self.teacher.model.forward_head(dense)
            played = self._wrapped(images)
        terms = {
            "class_loss": config.class_loss * classify(played.logits.float(), target),
            "logit_loss": config.logit_loss * logit_loss(played.logits, dense_logits),
            **self.student.terms(played, dense, labels, config),
        }
        loss = torch.stack(list(terms.values())).sum()
        numbers = {"loss": loss, "keep": played.keep, **terms}
        return loss, {name: value.detach() for name, value in numbers.items()}

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self._half is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, self._half)

    def state_dict(self) -> dict[str, Any]:
        """Weights, their moving average, optimiser, scaler, and number of updates."""
        return {
            "student": self.student.state_dict(),
            "average": self.policy.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "remembered": self.student.remembered(),
            "done": self.done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from :meth:`state_dict`.

        Raises:
            AttributeError, KeyError, RuntimeError, TypeError, ValueError: it is another tuner's.
        """
        self.student.load_state_dict(state["student"])
        self.policy.load_state_dict(state["average"])
        restore(self._optimizer, state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self.student.remember(state["remembered"])
        if not fits(state["done"], Within(0, self.config.updates)):
            raise Unfit(f"{state['done']!r:.40} updates are done")
        self.done = state["done"]


def _hard_loss(smoothing: float) -> Callable[[Tensor, Tensor], Tensor]:
    return LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()


def _optimizer(student: Trainee, config: FineTuneConfig) -> torch.optim.Optimizer:
    from timm.optim import list_optimizers

    if config.optimizer not in list_optimizers():
        raise UserError(
            f"optimizer={config.optimizer} is none of timm's: choose such as adamw, lamb or lion"
        )
    groups = student.groups(config.weight_decay, config.added_rate)
    try:
        optimizer = create_optimizer_v2(groups, config.optimizer, lr=config.lr)
    except (AssertionError, ImportError) as error:  # a package or a GPU that is not there
        raise UserError(
            f"optimizer={config.optimizer} can't be had here ({error}): choose such as adamw"
        ) from None
    if getattr(optimizer, "is_second_order", False):
        raise UserError(
            f"optimizer={config.optimizer} needs second derivatives, which are not computed here: "
            "choose such as adamw"
        )
    if any(isinstance(value, torch.dtype) for value in optimizer.defaults.values()):
        raise UserError(
            f"optimizer={config.optimizer} has a state that no checkpoint can hold: "
            "choose such as adamw"
        )
    return optimizer


def half_precision(amp: str, device: torch.device) -> torch.dtype | None:
    """The precision of autocast; None for full precision.

    Raises:
        UserError: float16 on a CPU, where small gradients underflow.
    """
    cuda = device.type == "cuda"
    if amp == "auto":
        if not cuda:
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if amp == "float16" and not cuda:
        raise UserError("amp=float16 needs a GPU: take bfloat16, or off")
    return {"off": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[amp]


@contextlib.contextmanager
def _drawing(seed: int, update: int, rank: int, device: torch.device) -> Iterator[None]:
    """A context in which the global generators are seeded for an update; restored afterwards.

    Besides torch's these are Python's and NumPy's, which timm's transforms and mixup use.
    """
    (number,) = np.random.SeedSequence([seed, update, rank]).generate_state(1).tolist()
    python, numpy = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            random.seed(number)
            np.random.seed(number)
            torch.manual_seed(number)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
