"""The dense model: a whole timm classifier, with which methods are compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn


class Dense(nn.Module):
    """A frozen timm classifier of any family; a :class:`~tokenenv.Backbone` is one in stages.

    Args:
        model: the timm model; it is used as it is, not copied.
        freeze: whether to put it into ``eval`` mode and to freeze its parameters.

    Attributes:
        model: as given.
        classes: number of classes.
    """

    def __init__(self, model: nn.Module, *, freeze: bool = True) -> None:
        super().__init__()
        if freeze:
            model.eval().requires_grad_(False)
        # timm's modules are not typed.
        self.model = cast(Any, model)
        self.classes = int(self.model.num_classes)

    @property
    def device(self) -> torch.device:
        """The parameters' device."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' floating-point type."""
        return next(self.parameters()).dtype

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(B, C, H, W)``, normalised -> logits ``(B, classes)``."""
        return self.model(images)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A context in which ``model`` is in eval mode; afterwards each module has its old mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
