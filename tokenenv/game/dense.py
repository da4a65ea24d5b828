"""The dense model's outputs for the images of a source: computed once for each, then kept."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from tokenenv.game.reduction import Reduction
from tokenenv.vit.backbone import Backbone


class DenseAnswers:
    """The dense model's logits, and its summary tokens where decisions are due, by image.

    Args:
        backbone: the model.
        reduction: says in which blocks decisions are due.

    Attributes:
        trail: whether summary tokens are kept, too; see :meth:`keep_trail`.
    """

    def __init__(self, backbone: Backbone, reduction: Reduction) -> None:
        self.backbone, self.reduction = backbone, reduction
        self.trail = False
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
        keys = index.tolist()
        missing = [i for i, key in enumerate(keys) if key not in self._known]
        if missing:
            fresh = self._run(images[missing])
            for i, *row in zip(missing, *(t.float().unbind(0) for t in fresh), strict=True):
                self._known[keys[i]] = (row[0], row[1])
        logits, trail = zip(*(self._known[key] for key in keys), strict=True)
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

    def export(self) -> tuple[list[int], list[Tensor]]:
        """Positions of all known images, and their outputs: CPU tensors with a row per image."""
        rows = zip(*self._known.values(), strict=True)
        return list(self._known), [torch.stack(column).cpu() for column in rows]

    def add(self, keys: Sequence[int], columns: Sequence[Tensor]) -> None:
        """Add what :meth:`export` of another game with the same source returned."""
        on_device = [column.to(self.backbone.device) for column in columns]
        for key, logits, trail in zip(keys, *on_device, strict=True):
            self._known[key] = (logits, trail)


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
