"""The embedded model for generated scenes: a digit among clutter, 144 or 576 tokens, offline.

Importing this module registers the model with timm as ``scenes_vit``. Its weights come with the
package, in half precision; ``examples/train_scenes_vit.py`` trained them. ``scenes_vit_patch2`` is
the same model with a token for every 2x2 pixels: four times the tokens. The images are those of
:mod:`tokenenv.data.scenes`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.layers import PatchEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tokenenv.vit.packaged import load_packaged

WEIGHTS = Path(__file__).parent / "weights" / "scenes_vit.safetensors"
"""The packaged weights of ``scenes_vit``."""

_CFG = {
    "input_size": (1, 48, 48),
    "fixed_input_size": True,
    "num_classes": 10,
    "label_names": tuple("0123456789"),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "mean": (0.25,),
    "std": (0.18,),
    "first_conv": "patch_embed.proj.0",
    "classifier": "head",
    "license": "apache-2.0",
}

default_cfgs = generate_default_cfgs({"scenes_vit": _CFG, "scenes_vit_patch2": _CFG})


class ConvolutionalPatches(PatchEmbed):
    """timm's patch embedding by two 3x3 convolutions, the first of stride 2.

    The second has stride 2 for patches of 4x4 pixels, and 1 for patches of 2x2. Each token reads
    7x7 pixels, so it overlaps with its neighbours. A small convolutional stem in place of one large
    filter makes a ViT learn faster (Xiao et al. 2021, "Early convolutions help transformers see
    better"). Takes ``PatchEmbed``'s arguments, with ``patch_size`` 4 or 2.
    """

    CHANNELS = 32
    """Between the two convolutions."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        single: nn.Conv2d = self.proj
        between = self.CHANNELS
        self.proj = nn.Sequential(  # type: ignore[assignment]
            nn.Conv2d(single.in_channels, between, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(between, single.out_channels, 3, stride=self.patch_size[0] // 2, padding=1),
        )


@register_model
def scenes_vit(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Build a ViT for ``(B, 1, 48, 48)`` scenes: 144 visual tokens of width 64, 8 blocks, 4 heads.

    Args:
        pretrained: load the packaged weights.
        **kwargs: arguments of timm's ``VisionTransformer``, in place of these values.

    Raises:
        UserError: the packaged weights do not fit the model that ``kwargs`` ask for.
    """
    return _built("scenes_vit", pretrained, {"patch_size": 4} | kwargs)


@register_model
def scenes_vit_patch2(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Build ``scenes_vit`` with a token for every 2x2 pixels: 576 visual tokens.

    The weights are those of ``scenes_vit``, with the position embeddings resampled by timm. Every
    second token of every second row is embedded as in ``scenes_vit``, the others lie between.

    Args:
        pretrained: load the packaged weights.
        **kwargs: arguments of timm's ``VisionTransformer``, in place of these values.

    Raises:
        UserError: the packaged weights do not fit the model that ``kwargs`` ask for.
    """
    return _built("scenes_vit_patch2", pretrained, {"patch_size": 2} | kwargs)


def _built(name: str, pretrained: bool, options: dict[str, Any]) -> VisionTransformer:
    shape = {"img_size": 48, "embed_dim": 64, "depth": 8, "num_heads": 4}
    model = build_model_with_cfg(
        VisionTransformer,
        name,
        pretrained=False,  # timm would look for the weights on a hub
        embed_layer=ConvolutionalPatches,
        **(shape | options),
    )
    if pretrained:
        _load(model)
    return model


def _load(model: VisionTransformer) -> None:
    from safetensors.torch import load_file
    from timm.layers import resample_abs_pos_embed

    state = {name: tensor.float() for name, tensor in load_file(WEIGHTS).items()}
    if isinstance(model.pos_embed, Tensor) and model.pos_embed.shape[1] == 24 * 24 + 1:
        state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], new_size=[24, 24])
    shape = "img_size=48, in_chans=1, num_classes=10, embed_dim=64, depth=8"
    load_packaged(model, state, "scenes_vit", shape)
