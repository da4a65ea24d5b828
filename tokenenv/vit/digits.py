"""The embedded model and data: a small Vision Transformer and scikit-learn's digits, offline.

Importing this module registers the model with timm as ``digits_vit``. Its weights come with the
package; ``examples/train_digits_vit.py`` trained them. ``digits_vit_16`` is the same model for
digits of 16x16 pixels: four times the tokens.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from timm.layers import PatchEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tokenenv.vit.packaged import load_packaged

WEIGHTS = Path(__file__).parent / "weights" / "digits_vit.safetensors"
"""The packaged weights of ``digits_vit``."""

_TEST_IMAGES = 600

_CFG = {
    "input_size": (1, 8, 8),
    "fixed_input_size": True,
    "num_classes": 10,
    "label_names": tuple("0123456789"),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "mean": (0.305,),
    "std": (0.376,),
    "first_conv": "patch_embed.proj",
    "classifier": "head",
    "license": "apache-2.0",
}

default_cfgs = generate_default_cfgs(
    {"digits_vit": _CFG, "digits_vit_16": {**_CFG, "input_size": (1, 16, 16)}}
)


class OverlappingPatches(PatchEmbed):
    """timm's patch embedding for patches of one pixel, each token reading 3x3 pixels.

    Takes ``PatchEmbed``'s arguments, with ``patch_size=1``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        single: nn.Conv2d = self.proj
        bias = single.bias is not None
        self.proj = nn.Conv2d(single.in_channels, single.out_channels, 3, padding=1, bias=bias)


@register_model
def digits_vit(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Build a ViT for ``(B, 1, 8, 8)`` digits: 64 visual tokens of width 48, 12 blocks, 3 heads.

    Args:
        pretrained: load the packaged weights.
        **kwargs: arguments of timm's ``VisionTransformer``, in place of these values.

    Raises:
        UserError: the packaged weights do not fit the model that ``kwargs`` ask for.
    """
    shape = {"patch_size": 1, "embed_dim": 48, "depth": 12, "num_heads": 3}
    model = build_model_with_cfg(
        VisionTransformer,
        "digits_vit",
        pretrained=False,  # timm would look for the weights on a hub
        embed_layer=OverlappingPatches,
        **(shape | kwargs),
    )
    if pretrained:
        _load(model)
    return model


@register_model
def digits_vit_16(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Build ``digits_vit`` for ``(B, 1, 16, 16)`` digits: 256 visual tokens.

    The weights are those of ``digits_vit``, with the position embeddings resampled by timm. The
    images are those of ``digits_vit``, enlarged twofold, so each token's 3x3 filter is dilated: it
    reads every second of 5x5 pixels.

    Args:
        pretrained: load the packaged weights.
        **kwargs: arguments of timm's ``VisionTransformer``, in place of these values.

    Raises:
        UserError: the packaged weights do not fit the model that ``kwargs`` ask for.
    """
    shape = {"img_size": 16, "patch_size": 1, "embed_dim": 48, "depth": 12, "num_heads": 3}
    model = build_model_with_cfg(
        VisionTransformer,
        "digits_vit_16",
        pretrained=False,
        embed_layer=OverlappingPatches,
        **(shape | kwargs),
    )
    assert isinstance(model.patch_embed, PatchEmbed)
    projection: nn.Conv2d = model.patch_embed.proj
    projection.dilation, projection.padding = (2, 2), (2, 2)
    if pretrained:
        _load(model)
    return model


def _load(model: VisionTransformer) -> None:
    from safetensors.torch import load_file
    from timm.layers import resample_abs_pos_embed

    state = load_file(WEIGHTS)
    if isinstance(model.pos_embed, Tensor) and model.pos_embed.shape[1] == 16 * 16 + 1:
        state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], new_size=[16, 16])
    shape = "img_size=8, in_chans=1, num_classes=10, embed_dim=48, depth=12"
    load_packaged(model, state, "digits_vit", shape)


def digits(split: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
    """scikit-learn's 1797 digits in a fixed split: 1197 for training, 600 for testing.

    Both parts have the same share of every digit. The split is made by a hash of the image's
    number, so it does not depend on a library's random generator.

    Returns:
        Images ``(n, 1, 8, 8)`` uint8 in ``[0, 255]`` and their labels ``(n,)`` int64.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    levels = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)

    place = np.empty(len(labels))
    for digit in range(10):
        members = sorted(np.flatnonzero(labels == digit).tolist(), key=_hash)
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    order = np.argsort(place, kind="stable")
    chosen = np.sort(order[:_TEST_IMAGES] if split == "test" else order[_TEST_IMAGES:])
    return torch.from_numpy(levels[chosen]), torch.from_numpy(labels[chosen].astype(np.int64))


def _hash(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()
