"""Images as a model should see them in training, by timm's transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tokenenv.errors import UserError


def augmentation(
    model: nn.Module, shape: tuple[int, int, int], *, crop: float, hflip: float, auto_augment: str
) -> Callable[[Tensor], Tensor] | None:
    """A random function of ``(C, H, W)`` uint8 pixels, or None where nothing shall change.

    It draws from the generators of Python, NumPy and torch.

    Args:
        model: for which interpolation the images are resized with.
        shape: of an image.
        crop: the least share of the image's area that is seen, then resized to all of it.
        hflip: probability of a mirror image.
        auto_augment: timm's words, such as ``rand-m9-mstd0.5-inc1``; empty for none.

    Raises:
        UserError: timm does not know the words.
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
