"""Accuracy, cost and speed of a method and of the dense model on the same images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from tokenenv.data import ImageSource
from tokenenv.errors import UserError
from tokenenv.game.cost import Cost, measured_macs
from tokenenv.game.episode import Episode, Execution
from tokenenv.game.latency import TimeCost
from tokenenv.game.policy import Method, as_method, play
from tokenenv.measure.paired import Difference, images_needed, paired_difference
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.dense import Dense


@dataclass
class Evaluation:
    """Predictions and costs of every image of a set; :meth:`report` summarises them.

    Attributes:
        labels, dense, reduced: ``(n,)`` true classes and both models' predictions.
        losses: ``(n,)`` cross-entropy of the reduced model, in nats.
        macs: ``(n,)`` multiply-adds of each image, policy included; the last block in full, as
            papers count it.
        executed: ``(n,)`` those that a pass for the logits executes, see
            :meth:`tokenenv.game.cost.Cost.executed`.
        lengths: ``(n, depth)`` visual tokens left after each block.
        dense_macs: multiply-adds of the dense model for one image.
        dense_executed: those of the dense model run for its logits alone.
        index: ``(n,)`` positions of the images in the source.
        seconds, dense_seconds: time of all reduced and of all dense passes; ``dense_seconds`` is
            None if the dense model's predictions were given.
        cost: ``(n,)`` predicted seconds of each image, or None.
        dense_cost: those of the dense model for one image, or None.
        divergence: ``(n,)`` Kullback-Leibler divergence of the reduced model's prediction from the
            dense one's, over all classes, nats; None if of the dense model only the predicted
            classes were given.
    """

    labels: Tensor
    dense: Tensor
    reduced: Tensor
    losses: Tensor
    macs: Tensor
    executed: Tensor
    lengths: Tensor
    dense_macs: float
    dense_executed: float
    index: Tensor
    seconds: float
    dense_seconds: float | None
    cost: Tensor | None = None
    dense_cost: float | None = None
    divergence: Tensor | None = None

    def as_executed(self) -> Evaluation:
        """The same with :attr:`executed` as its multiply-adds, those saved included."""
        return replace(self, macs=self.executed)

    @property
    def drop(self) -> float:
        """Top-1 lost against the dense model, percentage points."""
        right, dense_right = self.reduced == self.labels, self.dense == self.labels
        return 100.0 * (dense_right.sum() - right.sum()).item() / len(self.labels)

    def change(self) -> Difference:
        """Top-1 of the reduced model minus that of the dense one, with its 95 % interval."""
        return paired_difference(*self._hits())

    def images_needed(self, within: float = 0.5) -> int:
        """How many images would tell :meth:`change` to ``within`` percentage points each side."""
        return images_needed(*self._hits(), within)

    def _hits(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """``(n,)`` which images the reduced and the dense model classify rightly."""
        return (self.reduced == self.labels).numpy(), (self.dense == self.labels).numpy()

    @property
    def saving(self) -> float:
        """Share of multiply-adds saved, percent."""
        return 100.0 * (1 - self.macs.mean().item() / self.dense_macs)

    @property
    def cost_saving(self) -> float:
        """Share of :attr:`cost` saved, percent; :attr:`saving` without one."""
        if self.cost is None or self.dense_cost is None:
            return self.saving
        return 100.0 * (1 - self.cost.mean().item() / self.dense_cost)

    def report(self) -> dict[str, Any]:
        """Percentages, GMACs per image (1 MAC = 1 FLOP), mean tokens, images per second, times."""
        n = len(self.labels)

        def percent(hits: Tensor) -> float:
            return round(100.0 * hits.sum().item() / n, 3)

        times = {}
        if self.cost is not None and self.dense_cost is not None:
            times["predicted_ms"] = 1e3 * self.cost.mean().item()
            times["predicted_ms_dense"] = 1e3 * self.dense_cost
        return {
            "images": n,
            "top1": percent(self.reduced == self.labels),
            "top1_dense": percent(self.dense == self.labels),
            "agreement": percent(self.reduced == self.dense),
            "gmacs": self.macs.mean().item() / 1e9,
            "gmacs_dense": self.dense_macs / 1e9,
            "gmacs_executed": self.executed.mean().item() / 1e9,
            "gmacs_dense_executed": self.dense_executed / 1e9,
            "tokens": [round(v, 2) for v in self.lengths.double().mean(0).tolist()],
            "images_per_s": round(n / self.seconds, 2),
            "images_per_s_dense": round(n / self.dense_seconds, 2) if self.dense_seconds else None,
            **({} if self.divergence is None else {"divergence": self.divergence.mean().item()}),
            **times,
        }


@torch.inference_mode()
def evaluate(
    backbone: Backbone,
    policy: Method,
    source: ImageSource,
    *,
    batch_size: int = 64,
    restrict: bool = False,
    dense: Tensor | None = None,
    reference: Dense | None = None,
    execution: Execution | None = None,
    cost: TimeCost | None = None,
    progress: Callable[[int], object] = lambda n: None,
) -> Evaluation:
    """Run every image of ``source`` through the dense model and through the policy.

    The two take turns batch by batch, so their times can be compared.

    Args:
        backbone: the model.
        policy: the policy or reducer.
        source: the images; unreadable ones are skipped and listed in ``source.skipped``.
        batch_size: images per batch.
        restrict: predict only among the classes that occur in the source (the ImageNet-A and -R
            protocol).
        dense: ``(len(source),)`` predictions of the dense model, or ``(len(source), classes)`` its
            logits, if they are known; it is then not run again.
        reference: the dense model to compare with if ``backbone`` was fine-tuned; None:
            ``backbone`` itself.
        execution: ``masked``, ``padded`` or ``packed``; None: the device's default.
        cost: predicts the time of each image, beside its multiply-adds.
        progress: called with the number of images done after each batch.

    Raises:
        UserError: no image is readable, the method doesn't fit the model, or a logit is not
            finite.
    """
    policy = as_method(policy)
    policy.reduction.check(backbone)
    macs, costs = Cost(backbone), list[Tensor]()

    def read(episode: Episode) -> _Outcome:
        assert episode.logits is not None
        lengths = torch.stack(episode.fed, 1).cpu() - backbone.prefix
        if cost is not None:
            costs.append(cost.of(episode, policy).cpu())
        work = (macs.of(episode, policy).cpu(), macs.executed(episode, policy).cpu())
        return _Outcome(episode.logits, *work, lengths)

    found = _side_by_side(
        lambda images: play(backbone, policy, images, execution),
        read,
        backbone if reference is None else reference,
        source,
        batch_size=batch_size,
        restrict=restrict,
        dense=dense,
        progress=progress,
    )
    if cost is not None:
        found.cost, found.dense_cost = torch.cat(costs), cost.dense()
    return found


def evaluate_model(
    model: Callable[[Tensor], Tensor],
    reference: Dense,
    source: ImageSource,
    *,
    lengths: Sequence[float],
    macs: float | None = None,
    run_dense: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 64,
    restrict: bool = False,
    dense: Tensor | None = None,
    progress: Callable[[int], object] = lambda n: None,
) -> Evaluation:
    """:func:`evaluate` for a model that reduces its own tokens, equally for all images.

    Args:
        model: in eval mode, on the device and in the dtype of ``reference``.
        reference: the dense model.
        source: the images.
        lengths: number of visual tokens left after each block.
        macs: multiply-adds of one image; None: those that ``model``, a torch module, executes.
        run_dense: runs the dense model; None: as ``reference`` does itself.
        batch_size: images per batch.
        restrict: predict only among the classes that occur in the source.
        dense: as for :func:`evaluate`.
        progress: called with the number of images done.

    Raises:
        UserError: no image is readable, or a logit is not finite.
    """
    if macs is None:
        assert isinstance(model, nn.Module)
        macs = model_macs(model, source.shape)
    work = torch.tensor([macs], dtype=torch.float64)
    tokens = torch.tensor([list(lengths)])
    return _side_by_side(
        model,
        lambda logits: _Outcome(
            logits,
            work.expand(len(logits)),
            work.expand(len(logits)),
            tokens.expand(len(logits), len(lengths)),
        ),
        reference,
        source,
        batch_size=batch_size,
        restrict=restrict,
        dense=dense,
        progress=progress,
        run_dense=run_dense,
    )


@torch.inference_mode()
def dense_logits(
    model: Dense,
    source: ImageSource,
    *,
    batch_size: int = 64,
    progress: Callable[[int], object] = lambda n: None,
) -> Tensor:
    """``(len(source), classes)`` float32 logits of the dense model, on the CPU; NaN: unreadable.

    ``progress``: called with the number of images done after each batch.

    Raises:
        UserError: a logit is not finite.
    """
    found = torch.full((len(source), model.classes), torch.nan)
    for index, logits in _dense_batches(model, source, batch_size, progress):
        found[index] = logits.float().cpu()
    return found


@torch.inference_mode()
def dense_predictions(
    model: Dense,
    source: ImageSource,
    *,
    batch_size: int = 64,
    progress: Callable[[int], object] = lambda n: None,
) -> Tensor:
    """``(len(source),)`` class that the dense model predicts for each image; -1: unreadable.

    Arguments and errors as for :func:`dense_logits`.
    """
    found = torch.full((len(source),), -1)
    for index, logits in _dense_batches(model, source, batch_size, progress):
        found[index] = logits.argmax(1).cpu()
    return found


def _dense_batches(
    model: Dense, source: ImageSource, batch_size: int, progress: Callable[[int], object]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions ``(b,)`` and logits ``(b, classes)`` of the readable images, batch by batch."""
    for index in torch.arange(len(source)).split(batch_size):
        batch = source.batch(index)
        if len(batch.index):
            logits = model(batch.images.to(model.device, model.dtype))
            _check_finite(logits, source)
            yield batch.index, logits
            progress(len(batch.index))


def dense_macs(model: Dense, shape: Sequence[int]) -> float:
    """Multiply-adds of a dense model for one image of ``shape (C, H, W)``."""
    return Cost(model).dense() if isinstance(model, Backbone) else model_macs(model, shape)


def dense_executed(model: Dense, shape: Sequence[int]) -> float:
    """:func:`dense_macs` of a model that is run for its logits alone."""
    if isinstance(model, Backbone):
        return Cost(model).dense_executed()
    return model_macs(model, shape)


def model_macs(model: nn.Module, shape: Sequence[int]) -> float:
    """Multiply-adds that a model in eval mode executes for one image of ``shape (C, H, W)``."""
    like = next(model.parameters())
    with torch.inference_mode(False):
        image = torch.zeros(1, *shape, device=like.device, dtype=like.dtype)
        return measured_macs(lambda: model(image))


class _Outcome(NamedTuple):
    """Results of ``B`` images.

    Attributes:
        logits: ``(B, classes)``.
        macs, executed: ``(B,)`` multiply-adds.
        lengths: ``(B, depth)`` visual tokens left after each block.
    """

    logits: Tensor
    macs: Tensor
    executed: Tensor
    lengths: Tensor


_WORK = ("macs", "executed", "lengths")
"""Fields of :class:`_Outcome` that go into an evaluation as they are."""


@torch.inference_mode()
def _side_by_side(
    run: Callable[[Tensor], Any],
    read: Callable[[Any], _Outcome],
    model: Dense,
    source: ImageSource,
    *,
    batch_size: int,
    restrict: bool,
    dense: Tensor | None,
    progress: Callable[[int], object],
    run_dense: Callable[[Tensor], Tensor] | None = None,
) -> Evaluation:
    """Run the reduced and the dense model in turns; ``read`` works on the result untimed."""
    run_dense = model if run_dense is None else run_dense
    device = model.device
    allowed = _allowed(model, source, restrict)
    rows: dict[str, list[Tensor]] = {
        name: [] for name in ("labels", "dense", "reduced", "losses", "divergence", *_WORK, "index")
    }
    seconds = dense_seconds = 0.0
    for turn, index in enumerate(torch.arange(len(source)).split(batch_size)):
        batch = source.batch(index)
        if not len(batch.index):
            continue
        images = batch.images.to(device, model.dtype)
        for reduced_now in (turn % 2 == 0, turn % 2 == 1):
            start = _now(device)
            if reduced_now:
                found = run(images)
                seconds += _now(device) - start
            elif dense is None:
                known = run_dense(images)
                dense_seconds += _now(device) - start
            else:
                known = dense[batch.index].to(device)
        outcome = read(found)
        if known.ndim == 2:
            rows["divergence"].append(_divergence(known, outcome.logits))
            known = _predicted(known, source, allowed)
        rows["dense"].append(known.cpu())
        rows["labels"].append(batch.labels)
        rows["reduced"].append(_predicted(outcome.logits, source, allowed))
        loss = F.cross_entropy(outcome.logits.float(), batch.labels.to(device), reduction="none")
        rows["losses"].append(loss.cpu())
        for name in _WORK:
            rows[name].append(getattr(outcome, name))
        rows["index"].append(batch.index)
        progress(len(batch.index))
    if not rows["labels"]:
        raise UserError(f"no image of '{source.name}' could be read: check the files")
    table: dict[str, Any] = {name: torch.cat(parts) for name, parts in rows.items() if parts}
    return Evaluation(
        **table,
        dense_macs=dense_macs(model, source.shape),
        dense_executed=dense_executed(model, source.shape),
        seconds=seconds,
        dense_seconds=dense_seconds or None,
    )


def _allowed(model: Dense, source: ImageSource, restrict: bool) -> Tensor:
    """``(classes,)`` bool, the outputs that may be predicted: all, or the source's classes."""
    allowed = torch.full((model.classes,), not restrict, device=model.device)
    if restrict:
        allowed[source.classes.to(model.device)] = True
    return allowed


def _divergence(dense: Tensor, reduced: Tensor) -> Tensor:
    """``(B,)`` Kullback-Leibler divergence of reduced from dense predictions, from logits."""
    of, told = (F.log_softmax(logits.float(), -1) for logits in (dense, reduced))
    return F.kl_div(told, of, reduction="none", log_target=True).sum(-1).cpu()


def _predicted(logits: Tensor, source: ImageSource, allowed: Tensor) -> Tensor:
    """``(B,)`` the class of the largest logit, on the CPU; ``allowed``: ``(classes,)`` bool.

    Raises:
        UserError: a logit is not finite, so that the largest means nothing.
    """
    _check_finite(logits, source)
    return logits.masked_fill(~allowed, -torch.inf).argmax(1).cpu()


def _check_finite(logits: Tensor, source: ImageSource) -> None:
    if not logits.isfinite().all():
        raise UserError(
            f"the model gives values that are not finite for images of '{source.name}': check its "
            "weights, or take --dtype float32"
        )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
