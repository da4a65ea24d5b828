"""The proof that a backbone's stages compute what its model computes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tokenenv.errors import UserError, check_interrupt
from tokenenv.vit.dense import Dense, evaluating

_IMAGES = 2
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
_HALF = 0.03
"""Largest difference of logits, relative to 1 + the largest logit; rounding is far below."""


@torch.no_grad()
def prove(
    dense: Dense,
    staged: Callable[[Tensor], Tensor],
    image_shape: tuple[int, int, int],
    name: str,
) -> None:
    """Compare the model's own logits with those of its stages, of which no token leaves.

    Two random images of the model's size, always the same ones, in eval mode.

    Args:
        dense: the model.
        staged: images ``(B, C, H, W)`` -> logits ``(B, classes)``, computed in stages.
        image_shape: ``(C, H, W)``, the model's.
        name: what messages call the model.

    Raises:
        UserError: they differ, or are not finite: the model has code of its own, such as a
            ``forward`` that normalises images first, which the stages would leave out. The message
            lists overridden methods, patched instances and hooks.
    """
    model = dense.model
    with evaluating(model), torch.autocast(dense.device.type, enabled=False):
        generator = torch.Generator().manual_seed(0)
        images = torch.randn((_IMAGES, *image_shape), generator=generator)
        images = images.to(dense.device, dense.dtype)
        whole = model(images).float()
        try:
            logits = staged(images).float()
        except Exception as error:  # code of its own may expect whatever timm's model gives it
            check_interrupt(error)
            raise _refused(model, name, type(error).__name__) from error
    if not whole.isfinite().all():
        raise UserError(
            "the model's logits are not finite (of random images): check its weights for NaN and "
            "infinite values"
        )
    if logits.shape != whole.shape:
        raise _refused(model, name, f"logits of shape {tuple(logits.shape)}")
    apart = ((logits - whole).abs().max() / (1 + whole.abs().max())).item()
    if not apart <= _TOLERANCE.get(dense.dtype, _HALF):
        raise _refused(model, name, f"logits {apart:.2g} apart")


def _refused(model: nn.Module, name: str, what: str) -> UserError:
    found = "; ".join(own_code(model)) or "nothing of it was found from outside"
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
