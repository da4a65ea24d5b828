"""The dense model's outputs for the images of a source: computed once for each, then kept."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from tokenenv.game.reduction import Reduction
from tokenenv.vit.backbone import Backbone

KEPT_BYTES = 2**28
"""Bytes of the dense model's outputs that one game keeps."""


class DenseAnswers:
    """The dense model's logits, and its summary tokens where decisions are due, by image.

    Args:
        backbone: the model.
        reduction: says in which blocks decisions are due.

    What was computed is kept while it fits into :data:`KEPT_BYTES`.

    Attributes:
        trail: whether summary tokens are kept, too; see :meth:`keep_trail`.
        kept: whether anything is kept; else every call runs the model. Rounding depends on which
            images share a batch, so only without it do the outputs for a batch depend on nothing
            that was asked before.
    """

    def __init__(self, backbone: Backbone, reduction: Reduction) -> None:
        self.backbone, self.reduction = backbone, reduction
        self.trail, self.kept = False, True
        self._room = KEPT_BYTES
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._known)

    def copy(self) -> DenseAnswers:
        """The same outputs; what one of the two learns later the other does not know."""
        twin = copy(self)
        twin._known = dict(self._known)
        return twin

    def clear(self) -> None:
        """Forget the outputs of all images."""
        self._known.clear()
        self._room = KEPT_BYTES

    def keep_trail(self, trail: bool) -> None:
        """Keep summary tokens from now on if ``trail``; outputs without them are forgotten."""
        if trail and not self.trail:
            self.clear()
        self.trail = self.trail or trail

    def __call__(self, index: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """The dense model's outputs for some images; it runs only on those not yet known.

        Args:
            index: ``(B,)`` positions in the source.
            images: ``(B, C, H, W)``.

        Returns:
            ``(B, K)`` float32 logits; ``(B, T, D)`` float32 summary tokens at the second to the
            last decision and after the last block. T is the number of decisions, or 0 without
            :attr:`trail`.
        """
        if not self.kept:
            own, summaries = self._run(images)
            return own.float(), summaries.float()
        keys = index.tolist()
        missing = [i for i, key in enumerate(keys) if key not in self._known]
        fresh: dict[int, tuple[Tensor, Tensor]] = {}
        if missing:
            outputs = zip(*(t.float().unbind(0) for t in self._run(images[missing])), strict=True)
            fresh = dict(zip((keys[i] for i in missing), outputs, strict=True))
        for key, row in fresh.items():
            size = sum(each.nbytes for each in row)
            if size <= self._room:
                self._room -= size
                self._known[key] = row
        rows = [fresh.get(key) or self._known[key] for key in keys]
        logits, trail = zip(*rows, strict=True)
        return torch.stack(logits), torch.stack(trail)

    def _run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        backbone, reduction = self.backbone, self.reduction
        if not self.trail:
            return backbone(images), images.new_zeros(len(images), 0, backbone.dim)
        tokens, trail = backbone.embed(images), []
        due = reduction.blocks[1:]
        for block in range(backbone.depth):
            if block in due and not reduction.between:
                trail.append(backbone.summary(tokens))
            tokens, _ = backbone.attend(block, tokens)
            if block in due and reduction.between:
                trail.append(backbone.summary(tokens))
            tokens = backbone.feed(block, tokens)
        trail.append(backbone.summary(tokens))
        return backbone.classify(tokens), torch.stack(trail, 1)


CONFIDENCE_DIM = 3
"""Width of :func:`confidence`."""

LABELLED = 2
"""How many of these numbers, the first ones, need the label."""


def confidence(dense: Tensor, labels: Tensor) -> Tensor:
    """How confident the dense model is; for critics in training only, as it needs the labels.

    Args:
        dense: ``(B, K)`` logits of the dense model.
        labels: ``(B,)`` true classes.

    Returns:
        ``(B, 3)`` probability of the true class, its margin to the most probable other class, and
        the entropy of the prediction in nats.
    """
    p = dense.softmax(1)
    true = p.gather(1, labels[:, None])
    others = p.scatter(1, labels[:, None], 0.0).amax(1, keepdim=True)
    entropy = -(p * p.clamp(min=1e-12).log()).sum(1, keepdim=True)
    return torch.cat([true, true - others, entropy], dim=1)
