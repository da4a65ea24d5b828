"""The proof that a backbone's stages compute what its model computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tokenenv.errors import UserError

if TYPE_CHECKING:
    from tokenenv.vit.backbone import Backbone

_IMAGES = 2
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
_HALF = 0.03
"""Largest difference of logits, relative to 1 + the largest logit; rounding is far below."""


@torch.no_grad()
def prove(backbone: Backbone) -> None:
    """Compare the model's own logits with those of its stages, of which no token leaves.

    Two random images of the model's size, always the same ones, in eval mode.

    Raises:
        UserError: they differ, or are not finite: the model has code of its own, such as a
            ``forward`` that normalises images first, which the stages would leave out. The message
            lists overridden methods, patched instances and hooks.
    """
    model = backbone.model
    with _evaluating(model), torch.autocast(backbone.device.type, enabled=False):
        generator = torch.Generator().manual_seed(0)
        images = torch.randn((_IMAGES, *backbone.image_shape), generator=generator)
        images = images.to(backbone.device, backbone.dtype)
        whole = model(images).float()
        try:
            staged = _staged(backbone, images).float()
        except Exception as error:  # code of its own may expect whatever timm's model gives it
            raise _refused(backbone, type(error).__name__) from error
    if not whole.isfinite().all():
        raise UserError(
            "the model's logits are not finite (of random images): check its weights for NaN and "
            "infinite values"
        )
    if staged.shape != whole.shape:
        raise _refused(backbone, f"logits of shape {tuple(staged.shape)}")
    apart = ((staged - whole).abs().max() / (1 + whole.abs().max())).item()
    if not apart <= _TOLERANCE.get(backbone.dtype, _HALF):
        raise _refused(backbone, f"logits {apart:.2g} apart")


def _staged(backbone: Backbone, images: Tensor) -> Tensor:
    tokens = backbone.embed(images)
    for block in range(backbone.depth):
        tokens, _ = backbone.attend(block, tokens)
        tokens = backbone.feed(block, tokens)
    return backbone.classify(tokens)


def _refused(backbone: Backbone, what: str) -> UserError:
    name = backbone.architecture or type(backbone.model).__name__
    found = "; ".join(own_code(backbone.model)) or "nothing of it was found from outside"
    return UserError(
        f"model '{name}' is not supported: its stages, run one by one, don't give what model(x) "
        f"gives ({what}), so it has code of its own that would be left out ({found}): move that "
        "code out of the model, into the preparation of the images say, or register a family for it"
    )


def own_code(model: nn.Module) -> list[str]:
    """What may make a model compute something else than timm's class does, in words."""
    found = []
    for cls in type(model).__mro__:
        if cls.__module__.partition(".")[0] in ("timm", "torch", "builtins"):
            continue
        methods = [name for name, value in vars(cls).items() if callable(value)]
        found += [f"{cls.__name__} overrides {name}" for name in methods if name != "__init__"]
    for name, module in model.named_modules():
        where = name or "the model"
        if "forward" in vars(module):
            found.append(f"forward of {where} is patched")
        if module._forward_pre_hooks:
            found.append(f"{where} has a forward pre-hook")
        if module._forward_hooks:
            found.append(f"{where} has a forward hook")
    return found


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards each module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
