"""The papers by name."""

from __future__ import annotations

from tokenenv.errors import check_choice
from tokenenv.papers import claims
from tokenenv.papers.claims import DEIT_B, DEIT_S, DEIT_T, VIT_B, VIT_L
from tokenenv.papers.protocol import SEARCHED, Baseline, Paper, Study, Tier

_TOME = Baseline("ToMe", "tome:r={}", 0.0, 0.5, whole=True)
_PITOME = Baseline("PiToMe", "pitome:keep={}", strongest=0.5)
_EVIT = Baseline("EViT, frozen", "evit:keep={}")
_ZERO = Baseline("Zero-TPrune", "zerotprune:keep={}")
_ATS = Baseline("ATS", "ats:tokens={}", 1.0, 0.05, whole=True)
_DIFFRATE = Baseline("DiffRate", SEARCHED)
_RANDOM = Baseline("random", "random:keep={}")

_TRAIN = 1_281_167
"""Images of ImageNet-1K's training part."""

_TWO_PER_MAC = "1 MAC = 2 FLOPs, agent included"
_ONE_PER_MAC = "1 MAC = 1 FLOP"

_EPOCH = {"updates": _TRAIN // 64, "batch": 64 * 4, "evaluate_every": 500}
"""One epoch of a policy in rollouts of 64 images, each of them four times."""

RL4EVIT = Paper(
    "rl4evit",
    "RL4EViT: Reinforcement Learning-based Token Pruning in Vision Transformers "
    "(Lu et al., ICME 2025, arXiv 2503.23459)",
    _ONE_PER_MAC,
    "macs",
    (
        Study("RL4EViT", "rl4evit"),
        Study("RL4EViT, fine-tuned", "rl4evit-finetune", under="RL4EViT"),
        Study("DynamicViT", "dynamicvit", part="baseline", keep_of="random"),
        Study("RL4EViT, paper's reward", "rl4evit", {"reward": "alpha_beta"}, "ablation"),
        Study("RL4EViT, IPPO", "rl4evit", {"centralised": False}, "ablation"),
    ),
    (_RANDOM, _EVIT, _TOME),
    claims.RL4EVIT,
    {
        "smoke": Tier(
            ("digits_vit",),
            parts=("paper", "baseline"),
            settings={
                "RL4EViT": {"updates": 30},
                "RL4EViT, fine-tuned": {"updates": 30, "evaluate_every": 15},
                "DynamicViT": {"updates": 30, "evaluate_every": 15},
            },
            rounds=3,
        ),
        "small": Tier((DEIT_T,), settings={"RL4EViT, fine-tuned": {"updates": 400}}),
        # One epoch of the policy and one of fine-tuning, in batches of 64 and 128 images. 34 %
        # are the 11.6 GFLOPs of the table.
        "paper": Tier(
            (DEIT_S, DEIT_B),
            settings={
                "RL4EViT": {**_EPOCH, "target_saving": 34.0},
                "RL4EViT, paper's reward": _EPOCH,
                "RL4EViT, IPPO": {**_EPOCH, "target_saving": 34.0},
                "RL4EViT, fine-tuned": {
                    "updates": _TRAIN // 128,
                    "lr": 1e-5,
                    "evaluate_every": 500,
                },
                "DynamicViT": {
                    "updates": 30 * _TRAIN // 1024,
                    "batch": 1024,
                    "lr": 1e-3,
                    "evaluate_every": 1250,
                },
            },
            batch=128,
        ),
    },
    (
        "The paper's Tables 1 and 2 are not public: its row is quoted from a review of its "
        "predecessor, and the fine-tuned one from the abstract (best case, no GFLOPs).",
        "A-ViT, which the predecessor compares with, is not in this package.",
    ),
)

_LAYERS = (
    Study("DORA, terminal reward", "", {"terminal": True}, "ablation"),
    Study("DORA, constant penalty", "", {"closed_loop": False}, "ablation"),
)
"""Ablations of both DORAs; the system is filled in."""


def _ablations(system: str) -> tuple[Study, ...]:
    return tuple(Study(each.name, system, each.settings, each.part) for each in _LAYERS)


DORA = Paper(
    "dora",
    "DORA: Dynamic Online Reinforcement Agent for Token Merging in Vision Transformers "
    "(He et al., arXiv 2605.11683)",
    "the abstract counts merged tokens, no FLOPs",
    "top1",
    (Study("DORA", "dora"), *_ablations("dora")),
    (_TOME, _PITOME, _DIFFRATE, _ATS),
    claims.MERGING,
    {
        "smoke": Tier(("digits_vit",), ablation_seeds=1, settings={"": {"updates": 40}}, rounds=3),
        "small": Tier((DEIT_T,)),
        # The successor's rollouts, as the merging paper prints none.
        "paper": Tier(
            (DEIT_T, DEIT_S, DEIT_B, VIT_L),
            images=326_400,
            settings={
                "": {
                    "updates": 1171,
                    "batch": 256 * 4,
                    "critic_width": 256,
                    "critic_depth": 2,
                    "held_most": 10_240,
                    "target_drop": 0.0005,
                    "evaluate_every": 40,
                }
            },
            batch=320,
        ),
    },
    (
        "Only the abstract is public: up to 12.66 % of the tokens merged at a drop of at most 0.05 "
        "points, and relative advantages over baselines that it does not name.",
        "ToFu is not in this package.",
    ),
)

DORA_PRUNE = Paper(
    "dora-prune",
    "DORA: Dynamic Online Reinforcement Agent for Token Pruning in Vision Transformers "
    "(He et al., arXiv 2609.34325)",
    _TWO_PER_MAC,
    "top1",
    (
        Study("DORA", "dora-prune"),
        *_ablations("dora-prune"),
        Study("DORA, random selector", "dora-prune", {"selector": "random"}, "ablation"),
        Study("DORA, similarity selector", "dora-prune", {"selector": "redundancy"}, "ablation"),
    ),
    (_TOME, _DIFFRATE, _PITOME, _ZERO),
    claims.PRUNING,
    {
        "smoke": Tier(("digits_vit",), ablation_seeds=1, settings={"": {"updates": 20}}, rounds=3),
        "small": Tier((DEIT_T,)),
        # The paper's settings; it draws each image once, and its budgets are spaced by 2.
        "paper": Tier(
            (DEIT_B, VIT_B, VIT_L),
            images=326_400,
            settings={
                "": {
                    "updates": 1171,
                    "batch": 256 * 4,
                    "minibatches": 6,
                    "lr": 5e-5,
                    "critic_lr": 1e-4,
                    "critic_width": 256,
                    "critic_depth": 2,
                    "width": 128,
                    "penalty": 30.0,
                    "held_most": 2048,
                    "target_drop": 0.01,
                    "evaluate_every": 8,
                }
            },
            batch=320,
        ),
    },
    (
        "MCTF, Representation Shift and V-Pruner are not in this package: their rows hold the "
        "paper's numbers alone.",
        "timm has no classifier on DINOv2-B's frozen features: that backbone is left out.",
        "Each image is drawn four times, whose mean is the baseline of the advantage; the paper's "
        "rollouts hold 256 images once.",
    ),
)

LTM = Paper(
    "ltm",
    "LTM: Efficient Visual Transformer by Learnable Token Merging "
    "(Wang and Yang, TPAMI 2025, arXiv 2407.15219)",
    "1 MAC = 1 FLOP; ViT-S is printed without the products of attention",
    "macs",
    (
        Study("LTM", "ltm"),
        Study("dense, fine-tuned alike", "ltm", {"ratio": 1.0}, "ablation"),
    ),
    (_TOME, _PITOME),
    claims.LTM,
    {
        "smoke": Tier(("digits_vit",), ablation_seeds=1, settings={"": {"updates": 100}}, rounds=3),
        "small": Tier((DEIT_T,), settings={"": {"updates": 400}}),
        # 50 epochs of fine-tuning, which the first version of the paper reports; the final one
        # trains from scratch for 300.
        "paper": Tier(
            ("vit_small_patch16_224", "vit_base_patch16_224", "swin_tiny_patch4_window7_224"),
            settings={
                "": {
                    "updates": 50 * _TRAIN // 256,
                    "batch": 256,
                    "lr": 2e-4,
                    "evaluate_every": 5000,
                }
            },
            batch=128,
        ),
    },
    (
        "The paper trains from scratch for 300 epochs; here a pretrained model is fine-tuned, and "
        "the row 'dense, fine-tuned alike' shows what that alone does.",
        "ToFu and LTMP are not in this package.",
    ),
)

MSTM = Paper(
    "mstm",
    "MSTM: Multi-Scale And Token Mergence (Bian et al., arXiv 2306.04897)",
    _ONE_PER_MAC,
    "macs",
    (
        Study("MSTM", "mstm", {"keep": 0.7}),
        Study("EViT, fine-tuned", "evit", {"keep": 0.7}, "baseline"),
        Study("MSTM, pruning only", "mstm", {"keep": 0.7, "merge": False}, "ablation"),
        Study("MSTM, one scale", "mstm", {"keep": 0.7, "multi_scale": False}, "ablation"),
    ),
    (_EVIT, _TOME),
    claims.MSTM,
    {
        "smoke": Tier(("digits_vit",), ablation_seeds=1, settings={"": {"updates": 80}}, rounds=3),
        "small": Tier((DEIT_T,), settings={"": {"updates": 400}}),
        "paper": Tier(
            (DEIT_S,),
            settings={
                "": {
                    "updates": 30 * _TRAIN // 512,
                    "batch": 512,
                    "lr": 2e-5,
                    "evaluate_every": 2500,
                }
            },
            batch=128,
        ),
    },
    ("Only the abstract is public: model, saving and change in top-1.",),
)

PAPERS = {paper.name: paper for paper in (RL4EVIT, DORA, DORA_PRUNE, LTM, MSTM)}
"""All papers by the names that ``tokenenv reproduce`` takes."""


def find_paper(name: str) -> Paper:
    """A paper by its name.

    Raises:
        UserError: there is none of that name.
    """
    check_choice("paper", name, tuple(PAPERS))
    return PAPERS[name]
