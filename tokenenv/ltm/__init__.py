"""Learnable Token Merging (Wang and Yang, arXiv 2407.15219, TPAMI 2025), a baseline, not a game.

    from tokenenv import ltm

    fast = ltm.ltm(timm.create_model("swin_tiny_patch4_window7_224", pretrained=True))
    ltm.measure(fast, images)  # multiply-adds per image

``tokenenv train ltm`` fine-tunes one; :func:`load_ltm` reads its run folder.

``python examples/ltm_costs.py`` prints, at the default ratios (1 MAC = 1 FLOP, masks included):

===============  =====  ===========  ====  =====  ============  =====  ==============  ======
model            ratio  GMACs dense  LTM   saved  paper         saved  M params        GMACs [*]
===============  =====  ===========  ====  =====  ============  =====  ==============  ======
vit_small        0.63   4.60         3.65  20.6%  4.3 -> 3.7    14.0%  22.05 -> 22.13  3.41
swin_tiny        0.51   4.49         3.72  17.2%  4.5 -> 3.8    15.6%  28.29 -> 28.55  3.72
mobilevit_s      0.15   1.52         1.21  20.4%  1.4 -> 1.17   16.4%  5.58 -> 5.67    1.15
mobilevit_xs     0.15   0.77         0.64  16.6%  0.7 -> 0.52   25.7%  2.32 -> 2.37    0.61
efficientvit_b1  0.50   0.52         0.44  15.3%  0.52 -> 0.44  15.4%  9.10 -> 9.16    0.44
===============  =====  ===========  ====  =====  ============  =====  ==============  ======

All at 224 pixels. [*]: without the matrix products of fused attention, which the paper's MobileViT
figures leave out (without them timm's models cost 1.40 and 0.70 at 224 pixels). The paper's 0.52
for MobileViT-XS can't be reached here, because convolutions and the first attention of each stack
run on all tokens.
"""

from tokenenv.ltm.block import MaskKind
from tokenenv.ltm.bound import SeparableBound, label_weight
from tokenenv.ltm.model import LTM, RATIOS, Feature, ltm, measure
from tokenenv.ltm.storage import load_ltm, save_ltm

__all__ = [
    "LTM",
    "RATIOS",
    "Feature",
    "MaskKind",
    "SeparableBound",
    "label_weight",
    "load_ltm",
    "ltm",
    "measure",
    "save_ltm",
]
