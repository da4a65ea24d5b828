"""Policies whose probabilities are known."""

from __future__ import annotations

import torch

from agents.policies.actor import ActorPolicy, Widths
from tokenenv.game.rules import Rules
from tokenenv.vit.backbone import Backbone


def steady(backbone: Backbone, rules: Rules, chance: float) -> ActorPolicy:
    """A policy that takes the last action with one probability, whatever it sees."""
    widths = Widths(rules.agent_dim(backbone), rules.shared_dim(backbone), 0)
    policy = ActorPolicy(rules, widths, initial=chance, decide="systematic")
    torch.nn.init.zeros_(policy.actor.head.weight)
    return policy.eval()
