"""Per-block games for tests: rules of both kinds on any backbone, and how one is played."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenenv.game.episode import Episode
from tokenenv.game.rules import LayerMerge, LayerPrune, Observation
from tokenenv.vit.backbone import Backbone

BLOCKS = (0, 1, 3)
EXECUTION = pytest.mark.parametrize("execution", ["masked", "padded"])
KINDS = [
    "deit", "distilled", "registers (DINOv2)", "average pooling, no class token",
    "attention pooling (SigLIP)", "qk-norm",
]  # fmt: skip

Decide = Callable[[Observation], Tensor]


def merge_rules(backbone: Backbone, **kwargs: Any) -> LayerMerge:
    features = ("similarity", "size", "token", "keys")
    if backbone.has_class_token:
        features += ("cls_attention",)
    return LayerMerge(BLOCKS, **{"features": features, "grid": (0, 1, 3, 7, 11)} | kwargs)


def prune_rules(backbone: Backbone, **kwargs: Any) -> LayerPrune:
    features = ("keys",)
    if backbone.has_class_token:
        features += ("cls_attention", "redundancy")
    return LayerPrune(BLOCKS, **{"action": "tokens", "features": features} | kwargs)


@torch.inference_mode()
def run(backbone: Backbone, rules: Any, images: Tensor, decide: Decide, execution: str) -> Episode:
    episode = Episode.start(backbone, rules, images, execution=execution)
    while not episode.done:
        episode.act(decide(episode.observe(state=True)))
    return episode


def table(episode: Episode) -> Tensor:
    """``(depth, B)`` tokens in the MLP of each block."""
    return torch.stack(episode.fed)
