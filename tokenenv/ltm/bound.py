"""The separable bound on the information bottleneck of merged tokens, and its loss.

With soft cluster memberships ``phi`` of a block's merged tokens X~ and of the images X::

    IB  = I(X~; X) - I(X~; Y)
    IBB = mean_i { sum_ab phi(X~_i, a) phi(X_i, b) log phi(X_i, b)
                   - sum_a phi(X~_i, a) log Q(a | y_i) }   (LTM, arXiv 2407.15219, its IB section)

As memberships sum to one, the first term is ``sum_b phi(X_i, b) log phi(X_i, b)``, which does not
depend on the weights. It is reported but not differentiated; the label term is the loss.

For any set of images ``IBB >= IB - H(B)``, where H(B) is the entropy of the images' mean
membership, which does not depend on the weights either. (I(X~; X) <= H(B) + first term, since X~
depends on X; the label term is a cross-entropy and so at least H(A|Y); and H(A) >= 0.)

The published code takes Q and the centroids from different epochs, and from augmented images in
training mode. Here both come from one pass over the same un-augmented images in eval mode.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenenv.errors import UserError, check_choice
from tokenenv.game.checks import check_whole
from tokenenv.ltm.model import LTM, Feature
from tokenenv.vit.dense import evaluating

Kind = Literal["class", "kmeans"]

ETA = 0.1
"""Weight of the label term in the loss (LTM's published training script)."""

WARM_UP = 0.3
"""Share of the training before the label term is switched on (likewise)."""

_PIXELS = 16  # side of the images that are clustered; phi of X needs no detail
_LEAST = 1e-8  # lower bound of Q, so that the log of an empty cluster is finite
_ROUNDS = 20  # iterations of K-means


def soft_assign(x: Tensor, centroids: Tensor, beta: float) -> Tensor:
    """``softmax_k(-beta |x - c_k|^2)``: ``(n, D)`` and ``(K, D)`` -> ``(n, K)``."""
    # |x|^2 is the same for every cluster and cancels.
    return (beta * (2 * x @ centroids.T - centroids.square().sum(1))).softmax(1)


def membership(features: Tensor, centroids: Tensor, beta: float) -> Tensor:
    """:func:`soft_assign` of features and centroids of norm one, in float32."""
    return soft_assign(F.normalize(features.float(), dim=1), centroids, beta)


def label_term(phi: Tensor, log_q: Tensor, labels: Tensor) -> Tensor:
    """``-mean_i sum_a phi(X~_i, a) log Q(a | y_i)``, nats.

    Args:
        phi: ``(n, K)`` memberships of merged tokens.
        log_q: ``(K, classes)``.
        labels: ``(n,)`` int64.
    """
    return -(phi * log_q.T[labels]).sum(1).mean()


def input_term(phi: Tensor) -> Tensor:
    """``mean_i sum_b phi(X_i, b) log phi(X_i, b)``, nats: the bound's first term."""
    return -torch.special.entr(phi).sum(1).mean()


def information_bottleneck(phi: Tensor, inputs: Tensor, labels: Tensor, classes: int) -> Tensor:
    """``I(X~; X) - I(X~; Y)`` of memberships, nats.

    Args:
        phi: ``(n, K)`` memberships of merged tokens.
        inputs: ``(n, K')`` memberships of the images.
        labels: ``(n,)`` int64.
        classes: number of classes.
    """
    n = len(phi)
    one_hot = F.one_hot(labels, classes).to(phi.dtype)
    return _information(phi.T @ inputs / n) - _information(phi.T @ one_hot / n)


def label_weight(progress: float, eta: float = ETA, warm_up: float = WARM_UP) -> float:
    """Weight of the label term at ``progress`` (0 to 1) of the training: ``eta`` after warm-up."""
    return eta if progress >= warm_up else 0.0


@dataclass(frozen=True)
class Level:
    """Statistics of one feature.

    Attributes:
        centroids: ``(K, D)`` of norm one.
        log_q: ``(K, classes)`` log Q(a | y); columns of Q sum to one.
    """

    centroids: Tensor
    log_q: Tensor


@dataclass(frozen=True)
class Report:
    """Means over LTM blocks, nats.

    Attributes:
        bound: IBB.
        label: its label term.
        input: its first term.
        ib: the information bottleneck itself.
        floor: ``-H(B)``: the bound is at least ``ib + floor``.
    """

    bound: float
    label: float
    input: float
    ib: float
    floor: float


class SeparableBound:
    """The bound of a model, with statistics that :meth:`refresh` computes once per epoch.

    Args:
        model: the model with LTM blocks.
        classes: number of classes.
        kind: ``class``: the centroids are the class means, so that cluster indices mean the same
            in every pass; ``kmeans``: K-means centroids.
        clusters: K of K-means; None: ``classes``.
        beta: sharpness of memberships. With the published value 1 they are almost uniform and the
            bound is almost flat.
        feature: as for :meth:`~tokenenv.ltm.model.LTM.recording`.

    Attributes:
        levels: statistics of each feature; empty before the first pass.
        inputs: ``(K, pixels)`` centroids of the images.

    Raises:
        UserError: an unknown kind, or clusters below 1.
    """

    def __init__(
        self,
        model: LTM,
        classes: int,
        kind: Kind = "class",
        clusters: int | None = None,
        beta: float = 10.0,
        feature: Feature = "blocks",
    ) -> None:
        check_choice("kind", kind, Kind)
        self.model, self.classes, self.kind = model, classes, kind
        if clusters is not None:
            check_whole("clusters", clusters, 1)
        self.clusters = classes if clusters is None else clusters
        self.beta, self.feature = beta, feature
        self.levels: list[Level] = []
        self.inputs = torch.empty(0)

    def refresh(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Compute centroids and Q in one pass over some images.

        The features of all images are held on the model's device, ``n x D`` floats per LTM block;
        of a large set, pass some images of each class. In data-parallel training pass the same
        images to every process, so that all have the same statistics.

        Args:
            batches: un-augmented images ``(B, C, H, W)`` and their labels ``(B,)``.

        Raises:
            UserError: no image; a label out of range; no LTM block merges anything.
        """
        features, pixels, labels = self._pass(batches)
        self.levels = [self._level(found, labels) for found in features]
        self.inputs = self._centroids(pixels, labels)

    def loss(self, features: list[Tensor], labels: Tensor) -> Tensor:
        """The label term, mean over LTM blocks, nats; to be weighted by :func:`label_weight`.

        Args:
            features: the list that ``model.recording()`` filled in a forward pass.
            labels: ``(B,)`` int64.
        """
        terms = [
            label_term(membership(found, level.centroids, self.beta), level.log_q, labels)
            for found, level in zip(features, self.levels, strict=True)
        ]
        return torch.stack(terms).mean()

    def report(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Report:
        """The bound and the information bottleneck of a set of images.

        Args:
            batches: as for :meth:`refresh`; they may be other images.

        Raises:
            UserError: as for :meth:`refresh`.
        """
        features, pixels, labels = self._pass(batches)
        inputs = membership(pixels, self.inputs, self.beta)
        found = [
            membership(feature, level.centroids, self.beta)
            for feature, level in zip(features, self.levels, strict=True)
        ]
        pairs = list(zip(found, self.levels, strict=True))
        label = torch.stack([label_term(phi, level.log_q, labels) for phi, level in pairs]).mean()
        ib = torch.stack(
            [information_bottleneck(phi, inputs, labels, self.classes) for phi in found]
        ).mean()
        first, floor = input_term(inputs), -torch.special.entr(inputs.mean(0)).sum()
        return Report(
            bound=(first + label).item(),
            label=label.item(),
            input=first.item(),
            ib=ib.item(),
            floor=floor.item(),
        )

    @torch.no_grad()
    def _pass(
        self, batches: Iterable[tuple[Tensor, Tensor]]
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Features of each LTM block, pixels and labels of all images, in eval mode."""
        rows: list[list[Tensor]] = []
        pixels, known = [], []
        with evaluating(self.model), self.model.recording(self.feature) as found:
            for images, labels in batches:
                found.clear()
                self.model(images)
                rows.append([feature.float() for feature in found])
                pixels.append(_small(images))
                known.append(labels.to(images.device))
        if not rows:
            raise UserError("the bound's statistics need images: the batches are empty")
        if not rows[0]:
            raise UserError("no LTM block merges anything: take a ratio below 1")
        labels = torch.cat(known)
        if int(labels.min()) < 0 or int(labels.max()) >= self.classes:
            raise UserError(
                f"labels reach from {int(labels.min())} to {int(labels.max())} and there are "
                f"{self.classes} classes: give classes=..."
            )
        features = [torch.cat(level) for level in zip(*rows, strict=True)]
        return features, torch.cat(pixels), labels

    def _level(self, features: Tensor, labels: Tensor) -> Level:
        centroids = self._centroids(features, labels)
        phi = membership(features, centroids, self.beta)
        q = _class_sums(phi, labels, self.classes)
        empty = q.sum(1, keepdim=True) == 0  # classes without an image
        q = torch.where(empty, torch.full_like(q, 1 / q.shape[1]), q).clamp(min=_LEAST)
        return Level(centroids, (q / q.sum(1, keepdim=True)).log().T.contiguous())

    def _centroids(self, features: Tensor, labels: Tensor) -> Tensor:
        x = F.normalize(features.float(), dim=1)
        if self.kind == "class":
            return F.normalize(_class_sums(x, labels, self.classes), dim=1)
        return kmeans(x, self.clusters)


def kmeans(x: Tensor, clusters: int, rounds: int = _ROUNDS) -> Tensor:
    """Centroids of norm one by spherical K-means, initialised by points spread over the data.

    It is deterministic. A cluster that loses all its points keeps its centroid.

    Args:
        x: ``(n, D)`` points of norm one.
        clusters: K.
        rounds: number of iterations.

    Raises:
        UserError: fewer points than clusters.
    """
    if len(x) < clusters:
        raise UserError(f"{len(x)} images don't make {clusters} clusters: give more, or clusters=")
    generator = torch.Generator().manual_seed(0)
    centroids = x[torch.randperm(len(x), generator=generator)[:clusters].to(x.device)]
    for _ in range(rounds):
        sums = _class_sums(x, (x @ centroids.T).argmax(1), clusters)
        empty = sums.square().sum(1, keepdim=True) == 0
        centroids = torch.where(empty, centroids, F.normalize(sums, dim=1))
    return centroids


def _class_sums(x: Tensor, labels: Tensor, classes: int) -> Tensor:
    """``(classes, D)`` sums of the rows ``(n, D)`` of each class."""
    return x.new_zeros(classes, x.shape[1]).index_add_(0, labels, x)


def _small(images: Tensor) -> Tensor:
    """Images ``(B, C, H, W)`` as vectors ``(B, pixels)``, at most 16x16 pixels per channel."""
    size = (min(images.shape[2], _PIXELS), min(images.shape[3], _PIXELS))
    return F.adaptive_avg_pool2d(images.float(), size).flatten(1)


def _information(joint: Tensor) -> Tensor:
    """Mutual information of a joint distribution ``(K, K')``, nats."""
    entropy = torch.special.entr
    return entropy(joint.sum(0)).sum() + entropy(joint.sum(1)).sum() - entropy(joint).sum()
