"""Augmentation of training images by timm's transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tokenenv.errors import UserError


def augmentation(
    model: nn.Module, shape: tuple[int, int, int], *, crop: float, hflip: float, auto_augment: str
) -> Callable[[Tensor], Tensor] | None:
    """A random function of ``(C, H, W)`` uint8 pixels; None if the settings change nothing.

    It uses the global generators of Python, NumPy and torch.

    Args:
        model: the model, whose configuration names the interpolation.
        shape: ``(C, H, W)`` of an image.
        crop: smallest share of the image's area in a random resized crop; 1: no crop.
        hflip: probability of a horizontal flip.
        auto_augment: timm's name of a policy, such as ``rand-m9-mstd0.5-inc1``; empty: none.

    Raises:
        UserError: timm does not know the policy.
    """
    if crop == 1 and not hflip and not auto_augment:
        return None
    from timm.data import create_transform, resolve_model_data_config
    from torchvision.transforms.functional import to_pil_image

    try:
        transform: Any = create_transform(
            shape,
            is_training=True,
            scale=(crop, 1.0),
            hflip=hflip,
            color_jitter=0.0,
            auto_augment=auto_augment or None,
            interpolation=resolve_model_data_config(model)["interpolation"],
            normalize=False,
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(
            f"auto_augment={auto_augment} is nothing timm knows ({error or type(error).__name__}): "
            "give words such as rand-m9-mstd0.5-inc1"
        ) from None
    return lambda pixels: transform(to_pil_image(pixels))
