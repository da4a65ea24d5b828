"""Multiply-adds and parameters of LTM models at their default ratios, beside the paper's.

    python examples/ltm_costs.py

No weights are needed. The paper's FLOPs are the multiply-adds of its README (1 MAC = 1 FLOP). They
are not counted in the same way for all models: the MobileViT figures match 224 pixels without the
two matrix products of attention, which is the last column here. Compare the percentages.
"""

from __future__ import annotations

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tokenenv import ltm
from tokenenv.vit.dense import evaluating

# timm's name, pixels, the paper's GMACs dense and with LTM
PAPER = [
    ("vit_small_patch16_224", 224, 4.3, 3.7),
    ("swin_tiny_patch4_window7_224", 224, 4.5, 3.8),
    ("mobilevit_s", 224, 1.40, 1.17),
    ("mobilevit_xs", 224, 0.70, 0.52),
    ("efficientvit_b1", 224, 0.52, 0.44),
]


def attention_macs(model: nn.Module, images: torch.Tensor) -> float:
    """Multiply-adds of fused attention's two products, per image."""
    with torch.no_grad(), evaluating(model), FlopCounterMode(display=False) as counter:
        model(images)
    counts = counter.get_flop_counts()["Global"]
    fused = sum(flops for op, flops in counts.items() if "scaled_dot_product" in str(op))
    return fused / 2 / len(images)


def main() -> None:
    torch.manual_seed(0)
    print("| model | ratio | GMACs dense | LTM | saved | paper | saved | M params | GMACs* |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, pixels, paper_dense, paper in PAPER:
        model = timm.create_model(name)
        size = None if hasattr(model, "patch_embed") else pixels
        merged = ltm.ltm(model, image_size=size)
        images = torch.zeros(1, 3, pixels, pixels)
        dense, cost = ltm.measure(model, images), ltm.measure(merged, images)
        millions = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (model, merged)]
        short = name.split("_patch")[0]
        print(
            f"| {short} | {merged.config['ratio']:.2f} | {dense / 1e9:.2f} | {cost / 1e9:.2f} "
            f"| {1 - cost / dense:.1%} | {paper_dense:g} -> {paper:g} "
            f"| {1 - paper / paper_dense:.1%} "
            f"| {millions[0]:.2f} -> {millions[1]:.2f} "
            f"| {(cost - attention_macs(merged, images)) / 1e9:.2f} |"
        )
    print("* without the products of fused attention; Swin's and EfficientViT's are not fused")


if __name__ == "__main__":
    main()
