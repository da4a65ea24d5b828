"""A backbone family of your own, for models that the package does not support.

    python examples/extend/own_family.py

timm's vit_base_patch16_rpn_224 has another kind of block: its norms come after attention and after
the MLP (ResPostBlock). With a family that defines the token-wise parts of such a block, these
models work everywhere: in games, published methods, cost, compress and fine-tuning.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor

from agents import parse_policy
from tokenenv import Backbone, compress, open_source
from tokenenv.game.policy import play
from tokenenv.measure.evaluation import evaluate
from tokenenv.vit.families import register_family
from tokenenv.vit.families.vision_transformer import (
    VisionTransformerFamily,
    attention_refusal,
    projected,
    queries_keys_values,
)


@register_family
class ResPostFamily(VisionTransformerFamily):
    """timm's VisionTransformer with residual post-norm; it differs in the blocks only."""

    name = "res_post"

    @classmethod
    def block_refusal(cls, i: int, block: Any) -> str | None:
        """The reason why the block is not supported; None if it is."""
        if type(block) is not ResPostBlock:
            return f"block {i} is a {type(block).__name__}, not a ResPostBlock"
        return attention_refusal(i, block.attn)

    @staticmethod
    def enter(block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Attention reads the tokens without a norm."""
        return x, *queries_keys_values(block.attn, x)

    @staticmethod
    def leave(block: Any, x: Tensor, h: Tensor, out: Tensor) -> Tensor:
        """The norm comes after attention's projection."""
        return x + block.drop_path1(block.norm1(projected(block.attn, h, out)))

    @staticmethod
    def feed(block: Any, x: Tensor) -> Tensor:
        """The norm comes after the MLP."""
        return x + block.drop_path2(block.norm2(block.mlp(x)))

    def normalised(self, block: int, x: Tensor) -> Tensor:
        """The tokens as they are: no norm precedes attention."""
        return x


def small_model() -> torch.nn.Module:
    """A small version of the model for scikit-learn's digits, with random weights."""
    torch.manual_seed(0)
    options = {"img_size": 8, "patch_size": 1, "in_chans": 1, "num_classes": 10}
    shape = {"embed_dim": 48, "depth": 4, "num_heads": 3, "init_values": 1.0}
    return timm.create_model("vit_base_patch16_rpn_224", **options, **shape).eval()


def main() -> None:
    model = small_model()
    backbone = Backbone(model)
    source = open_source("digits", model, split="test", limit=64)
    images = source.batch(torch.arange(64)).images
    with torch.inference_mode():
        staged = play(backbone, parse_policy("keep-all", backbone.depth), images).logits
        print(f"keep-all against the model: {(staged - model(images)).abs().max():.0e}")
    tome = parse_policy("tome:r=8", backbone.depth)
    print(f"tome:r=8 saves {evaluate(backbone, tome, source).saving:.1f} % of the MACs")
    print(f"compressed: logits {tuple(compress(model, tome)(images).shape)}")


if __name__ == "__main__":
    main()
