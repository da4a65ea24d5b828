"""Policies that learn nothing: the yardsticks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tokenenv.reduction import inverse
from tokenenv.rewards import check_keep
from tokenenv.rules import Observation, TokenPrune


class _Free:
    """A decision without a network."""

    def macs(self, agents: Tensor) -> Tensor:
        """Multiply-adds of one decision: none."""
        return torch.zeros_like(agents)


@dataclass
class KeepAll(_Free):
    """Nobody leaves: the dense model, played as a game."""

    rules: TokenPrune

    def __post_init__(self) -> None:
        self.rules = replace(self.rules, features=("position",), share=False)

    def act(self, observation: Observation) -> Tensor:
        """``(B, A)`` ones."""
        return torch.ones_like(observation.active, dtype=torch.long)


@dataclass
class RandomPrune(_Free):
    """At each decision a random ``ceil(keep n)`` of an image's ``n`` living tokens stay.

    Draws come from a generator of its own, in the order of the calls and of the tokens as they
    lie: the same images in another order, or in another execution, get other draws.
    """

    rules: TokenPrune
    keep: float
    seed: int = 0
    _generator: torch.Generator | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check_keep(self.keep)
        self.rules = replace(self.rules, features=("position",), share=False)

    def act(self, observation: Observation) -> Tensor:
        """``(B, A)`` 1 for those that stay."""
        device = observation.active.device
        if self._generator is None:
            self._generator = torch.Generator(device).manual_seed(self.seed)
        score = torch.rand(observation.active.shape, generator=self._generator, device=device)
        return keep_highest(score, observation.active, self.keep)


@dataclass
class TopK(_Free):
    """At each decision the ``ceil(keep n)`` living tokens with the highest score stay.

    ``feature="cls_attention"`` is EViT's criterion without the fused token (Liang et al. 2022,
    section 3.2), ``feature="norm"`` the length of the embedding.
    """

    rules: TokenPrune
    keep: float
    feature: str = "cls_attention"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        self.rules = replace(self.rules, features=(self.feature,), share=False)

    def act(self, observation: Observation) -> Tensor:
        """``(B, A)`` 1 for those that stay."""
        score = observation.feature(self.feature)[..., 0]
        return keep_highest(score, observation.active, self.keep)


def keep_highest(score: Tensor, active: Tensor, keep: float) -> Tensor:
    """1 for the ``ceil(keep n)`` highest of an image's ``n`` active scores. All ``(B, A)``."""
    count = (active.sum(1, keepdim=True) * keep).ceil()
    score = score.masked_fill(~active, -torch.inf)
    order = torch.sort(score, dim=1, descending=True, stable=True).indices
    return (inverse(order) < count).long()
