"""Per-block games for tests: rules of both kinds on any backbone, and how one is played."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from agents.policies.actor import ActorPolicy, Widths
from agents.policies.gated import GatedPolicy
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
    episode = Episode(backbone, rules, images, execution=execution)
    while not episode.done:
        episode.act(decide(episode.observe(state=True)))
    return episode


def table(episode: Episode) -> Tensor:
    """``(depth, B)`` tokens in the MLP of each block."""
    return torch.stack(episode.fed)


def shake(policy: Any, by: float) -> Any:
    """What the policy decides depends on the image."""
    generator = torch.Generator().manual_seed(2)
    for parameter in policy.parameters():
        parameter.data += by * torch.randn(parameter.shape, generator=generator)
    return policy


def actor(backbone: Backbone) -> ActorPolicy:
    torch.manual_seed(0)
    rules = merge_rules(backbone)
    widths = Widths(rules.agent_dim(backbone), rules.shared_dim(backbone), 1)
    policy = shake(ActorPolicy(rules, widths, hidden=(16, 8)), 0.1)
    # Near half of the candidates merge: those more similar than the mean one.
    second = rules.layout(backbone)["similarity"].start + 1
    policy.lean_on(slice(second, second + 1), 3.0)
    return policy


def gated(backbone: Backbone, **kwargs: Any) -> GatedPolicy:
    torch.manual_seed(0)
    rules = prune_rules(backbone)
    own, shared = rules.agent_dim(backbone), rules.shared_dim(backbone)
    widths = {"key": shared - len(BLOCKS) - 3, "own": own, "patches": backbone.patches}
    kwargs = {"initial_gate": 0.6, "initial_budget": (20.0,)} | kwargs
    policy = GatedPolicy(rules, widths, width=16, **kwargs)
    return shake(policy, 0.5)
