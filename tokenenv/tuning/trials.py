"""Trials of candidates: on how many images they differ from the dense model, how fast they are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.isotonic import isotonic_regression
from torch import Tensor

from tokenenv.data import ImageSource
from tokenenv.errors import UserError
from tokenenv.game.latency import LatencyTable
from tokenenv.game.policy import play
from tokenenv.measure.candidate import MethodCandidate
from tokenenv.measure.certify import Pairs
from tokenenv.vit.dense import Dense

_BATCH = 64


@dataclass(frozen=True)
class Trial:
    """What is known of a candidate.

    Attributes:
        what: its name.
        images: on how many images it ran, 0: on none yet.
        divergence: mean KL divergence of its predictions from the dense model's there, nats.
        agree: images with the dense model's prediction.
        wins, losses: images that only it, or only the dense model, classifies rightly.
        limit: speed-up by the table of times if its decisions took none.
        speedup: on the clock; None if it was not timed.
    """

    what: str
    images: int = 0
    divergence: float = 0.0
    agree: int = 0
    wins: int = 0
    losses: int = 0
    limit: float = 1.0
    speedup: float | None = None

    @property
    def pairs(self) -> Pairs:
        """On how many images the two models differ."""
        return Pairs(self.wins, self.losses, self.images)

    @property
    def agreement(self) -> float:
        """Images with the dense model's prediction, percent."""
        return 100.0 * self.agree / self.images

    @property
    def speed(self) -> float:
        """The speed-up on the clock, or the limit of one that was not timed."""
        return self.limit if self.speedup is None else self.speedup

    def to_dict(self) -> dict[str, Any]:
        """All attributes by name, as JSON."""
        return asdict(self)


class Reference:
    """What the dense model says of some images, in a fixed random order.

    Args:
        dense: the dense model, in the precision that it was given in.
        source: the images; unreadable ones are left out.
        labels: whether they are labelled; else what the dense model says counts as right.
        seed: of the order.
        progress: called with the number of images done.

    Attributes:
        source: the images.
        index: ``(n,)`` positions in it, in that order.
        labels, predictions: ``(n,)`` classes.
        log_probs: ``(n, classes)`` the dense model's.

    Raises:
        UserError: no image can be read, or a logit is not finite.
    """

    def __init__(
        self,
        dense: Dense,
        source: ImageSource,
        *,
        labels: bool,
        seed: int,
        progress: Callable[[int], object] = lambda n: None,
    ) -> None:
        self.source = source
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        with torch.inference_mode():
            for index in order.split(_BATCH):
                batch = source.batch(index)
                if len(batch.index):
                    logits = dense(batch.images.to(dense.device, dense.dtype)).float().cpu()
                    found.append((batch.index, batch.labels, logits.log_softmax(-1)))
                    progress(len(batch.index))
        if not found:
            raise UserError(f"no image of '{source.name}' could be read: check the files")
        self.index, self.labels, self.log_probs = (
            torch.cat(column) for column in zip(*found, strict=True)
        )
        if not self.log_probs.isfinite().all():
            raise UserError(
                f"the model gives values that are not finite for images of '{source.name}': check "
                "its weights"
            )
        self.predictions = self.log_probs.argmax(1)
        if not labels:
            self.labels = self.predictions

    def __len__(self) -> int:
        return len(self.index)

    @property
    def top1(self) -> float:
        """Top-1 of the dense model, percent."""
        return 100.0 * (self.predictions == self.labels).double().mean().item()

    def images(self, count: int) -> Tensor:
        """``(count, C, H, W)`` the first images, normalised."""
        return self.source.batch(self.index[:count]).images

    @torch.inference_mode()
    def extend(
        self, trial: Trial, candidate: MethodCandidate, count: int, table: LatencyTable | None
    ) -> Trial:
        """The trial on the first ``count`` images; those that it has seen are not run again.

        Args:
            trial: what is known.
            candidate: the method on its backbone.
            count: number of images.
            table: of the backbone's times, for the limit; None leaves that as it is.
        """
        method, backbone = copy.deepcopy(candidate.method), candidate.backbone
        found, limits = trial, list[float]()
        for part in torch.arange(trial.images, min(count, len(self))).split(_BATCH):
            images = self.source.batch(self.index[part]).images
            episode = play(backbone, method, images.to(backbone.device, backbone.dtype))
            assert episode.logits is not None
            logits = episode.logits.float().cpu()
            found = self._counted(found, logits)
            if table is not None:
                seconds = table.backbone_seconds(episode.backbone, episode.attended, episode.fed)
                limits.append(_dense_seconds(table, candidate) / seconds.mean().item())
        limit = float(np.mean(limits)) if limits else trial.limit
        return replace(found, limit=limit)

    @torch.inference_mode()
    def extend_run(self, trial: Trial, run: Callable[[Tensor], Tensor], count: int) -> Trial:
        """:meth:`extend` for anything that runs; ``run``: images ``(B, C, H, W)`` -> logits."""
        for part in torch.arange(trial.images, min(count, len(self))).split(_BATCH):
            logits = run(self.source.batch(self.index[part]).images).float().cpu()
            trial = self._counted(trial, logits)
        return trial

    def _counted(self, trial: Trial, logits: Tensor) -> Trial:
        """The trial with the next images, of which ``logits (n, classes)`` are given."""
        if not logits.isfinite().all():
            raise UserError(f"'{trial.what}' gives values that are not finite")
        part = slice(trial.images, trial.images + len(logits))
        log_probs, dense = logits.log_softmax(-1), self.log_probs[part]
        total = F.kl_div(log_probs, dense, reduction="sum", log_target=True).item()
        reduced, before = logits.argmax(1), self.predictions[part]
        wins, losses, images = trial.pairs + Pairs.of(self.labels[part], before, reduced)
        return replace(
            trial,
            images=images,
            divergence=(trial.divergence * trial.images + total) / images,
            agree=trial.agree + int((reduced == before).sum()),
            wins=wins,
            losses=losses,
        )


def _dense_seconds(table: LatencyTable, candidate: MethodCandidate) -> float:
    backbone = candidate.backbone
    full = [torch.tensor([backbone.prefix + backbone.patches])] * backbone.depth
    return table.backbone_seconds(backbone, full, full).item()


def expected_losses(trials: Sequence[Trial]) -> list[float]:
    """The top-1 that each is expected to lose, percentage points, at least 0.

    One image of 400 is a quarter of a point, so what a single candidate loses is mostly chance; the
    divergence from the dense model is not. The losses are fitted as a function of the divergence
    that does not fall (isotonic regression), over all candidates.
    """
    if not trials:
        return []
    order = sorted(range(len(trials)), key=lambda i: trials[i].divergence)
    lost = np.array([trials[i].pairs.lost for i in order])
    fitted = isotonic_regression(lost, sample_weight=[trials[i].images for i in order], y_min=0.0)
    found = dict(zip(order, fitted.tolist(), strict=True))
    return [found[i] for i in range(len(trials))]


def front_first(trials: Sequence[Trial]) -> list[Trial]:
    """Trials by layers: first those that no other one beats in both speed and divergence.

    Then those that none of the rest beats, and so on; within a layer the fastest first.
    """
    left = sorted(trials, key=lambda trial: (-trial.speed, trial.divergence))
    found: list[Trial] = []
    while left:
        best, layer = float("inf"), list[Trial]()
        for trial in left:
            if trial.divergence < best:
                best = trial.divergence
                layer.append(trial)
        found += layer
        left = [trial for trial in left if trial not in layer]
    return found
