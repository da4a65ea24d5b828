"""The numbers that the papers print."""

from __future__ import annotations

from tokenenv.papers.protocol import IMAGENET, IMAGENET_A, IMAGENET_C, Claim

DEIT_T, DEIT_S, DEIT_B = (f"deit_{size}_patch16_224" for size in ("tiny", "small", "base"))
VIT_B, VIT_L = (f"vit_{size}_patch16_224.augreg_in21k_ft_in1k" for size in ("base", "large"))
DINOV2_B = "vit_base_patch14_dinov2"

_PRUNING: dict[str, dict[str, tuple[tuple[float, float, int] | None, ...]]] = {
    DEIT_B: {
        "dense": ((81.8, 35.2, 3230), (27.9, 35.2, 3230)),
        "ToMe": ((80.9, 24.1, 3163), (26.6, 29.6, 2433)),
        "DiffRate": ((80.8, 22.1, 3512), None),
        "PiToMe": ((80.8, 24.1, 3821), (26.7, 23.6, 3844)),
        "MCTF": ((80.8, 21.9, 2122), (26.7, 26.6, 1647)),
        "Zero-TPrune": ((80.8, 25.9, 2960), (26.7, 23.2, 3216)),
        "Representation Shift": ((80.8, 26.7, 3705), (26.7, 28.5, 3480)),
        "V-Pruner": ((80.8, 28.3, 3917), (26.6, 32.5, 3441)),
        "DORA": ((80.8, 21.7, 3944), (26.7, 21.0, 4233)),
    },
    VIT_B: {
        "dense": ((84.6, 35.2, 3211), (44.0, 35.2, 3209)),
        "ToMe": ((83.7, 25.2, 2887), (43.1, 29.6, 2432)),
        "DiffRate": ((83.8, 23.1, 3018), None),
        "PiToMe": ((83.8, 26.2, 3494), (43.2, 26.5, 3458)),
        "MCTF": ((83.8, 23.7, 1900), (43.2, 26.6, 1647)),
        "Zero-TPrune": ((83.8, 26.8, 2800), (43.2, 23.3, 3201)),
        "Representation Shift": ((83.8, 28.1, 3508), (43.2, 28.6, 3457)),
        "V-Pruner": ((83.8, 29.9, 3719), (43.2, 34.3, 3278)),
        "DORA": ((83.8, 23.6, 3725), (43.2, 23.2, 3831)),
    },
    VIT_L: {
        "dense": ((85.8, 123.4, 998), (55.3, 123.4, 997)),
        "ToMe": ((85.0, 84.8, 1013), (54.6, 115.7, 726)),
        "DiffRate": ((85.1, 81.8, 963), (54.6, 77.2, 1070)),
        "PiToMe": ((85.1, 89.2, 1184), (54.7, 102.9, 1035)),
        "MCTF": ((85.1, 73.4, 755), (54.7, 109.4, 464)),
        "Zero-TPrune": ((85.1, 88.2, 1159), (54.7, 75.1, 1304)),
        "Representation Shift": ((85.1, 86.8, 1288), (54.7, 94.3, 1182)),
        "V-Pruner": ((85.1, 106.7, 1140), (54.6, 121.5, 1012)),
        "DORA": ((85.1, 74.9, 1394), (54.7, 74.3, 1456)),
    },
    DINOV2_B: {
        "dense": ((84.5, 46.5, 1842), (57.3, 46.5, 1842)),
        "ToMe": ((83.6, 36.2, 1340), (55.9, 40.8, 1176)),
        "DiffRate": (None, (56.0, 33.5, 1640)),
        "PiToMe": ((83.7, 37.2, 1854), (56.0, 37.4, 1843)),
        "MCTF": ((83.7, 33.8, 701), (56.0, 36.8, 628)),
        "Zero-TPrune": ((83.7, 36.5, 1085), (56.0, 33.9, 1282)),
        "Representation Shift": ((83.7, 37.4, 2070), (56.0, 41.3, 1879)),
        "V-Pruner": ((83.7, 37.5, 2301), (55.9, 44.0, 1992)),
        "DORA": ((83.7, 30.3, 2466), (56.0, 32.5, 2389)),
    },
}
"""DORA (pruning), Table 1: top-1, GFLOPs (2 per MAC), images per second on ImageNet-1K and -A."""

PRUNING = (
    *(
        Claim(method, model, *numbers, data=data)
        for model, methods in _PRUNING.items()
        for method, sets in methods.items()
        for data, numbers in zip((IMAGENET, IMAGENET_A), sets, strict=True)
        if numbers is not None
    ),
    # Ablations of DeiT-B: drops from 81.79 %, and a selector that replaces the learned one.
    Claim("DORA, terminal reward", DEIT_B, 80.81, 22.95),
    Claim("DORA, constant penalty", DEIT_B, 78.65, 17.78),
    Claim("DORA, random selector", DEIT_B, 79.1),
    Claim("DORA, similarity selector", DEIT_B, 80.5),
)

MERGING = tuple(
    Claim("DORA", DEIT_B, change=-0.05, data=data) for data in (IMAGENET, IMAGENET_A, IMAGENET_C)
)
"""DORA (merging): only the abstract is public, which names no GFLOPs and no model."""

RL4EVIT = (
    Claim("dense", DEIT_B, 81.8, 17.6),
    Claim("RL4EViT", DEIT_B, 81.38, 11.6),
    Claim("RL4EViT, fine-tuned", DEIT_B, change=-0.1, speedup=1.44),
    Claim("DynamicViT", DEIT_B, 81.3, 11.2),
)
"""RL4EViT: Table 1 as a reviewer of its predecessor quotes it, and the abstract's best cases."""

LTM = (
    *(
        claim
        for model, dense, merged in (
            ("vit_small_patch16_224", (81.2, 4.3), (81.8, 3.7)),
            ("vit_base_patch16_224", (83.7, 17.6), (83.9, 12.9)),
            ("swin_tiny_patch4_window7_224", (81.3, 4.5), (81.8, 3.8)),
            ("swin_base_patch4_window7_224", (83.5, 15.4), (83.8, 12.0)),
        )
        for claim in (Claim("dense", model, *dense), Claim("LTM", model, *merged))
    ),
    *(
        Claim(method, model, *numbers)
        for model, rows in {
            "mobilevit_xs": ((74.8, 0.70), (72.7, 0.54), (73.3, 0.54), (73.9, 0.56), (75.8, 0.52)),
            "mobilevit_s": ((78.4, 1.40), (76.7, 1.22), (77.2, 1.22), (77.5, 1.26), (79.7, 1.17)),
            "efficientvit_b1": (
                (79.4, 0.52), (78.8, 0.47), (79.0, 0.47), (79.2, 0.50), (80.2, 0.44),
            ),
        }.items()
        for method, numbers in zip(("dense", "ToMe", "ToFu", "LTMP", "LTM"), rows, strict=True)
    ),
)  # fmt: skip
"""LTM: the tables of its README, trained from scratch for 300 epochs."""

MSTM = (
    Claim("dense", DEIT_S, 79.8, 4.6),
    Claim("MSTM", DEIT_S, change=-0.1, saved=33.0),
)
"""MSTM: the abstract; nothing else is public."""
