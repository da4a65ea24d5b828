"""Policies that PPO trains: they draw actions at random and say how likely these were."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from agents.workers import WHOLE, Rows
from tokenenv.game.policy import Policy
from tokenenv.game.rules import Observation

Columns = dict[str, Tensor]
"""Tensors of a batch by name, their first dimensions alike."""


def columns(observation: Observation) -> Columns:
    """The tensors of an observation: agents, shared, active, state; legal and tokens if there."""
    names = ("agents", "shared", "active", "state", "legal", "tokens")
    found = {name: getattr(observation, name) for name in names}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


class Head(NamedTuple):
    """One part of an action: ``(B, K)`` log-probabilities, entropies, and whether they count."""

    log_prob: Tensor
    entropy: Tensor
    mask: Tensor


class Trainable(nn.Module, Policy):
    """A policy that can be trained.

    Attributes:
        heads: names of the parts of an action, the first of which always counts.
    """

    heads: tuple[str, ...]
    threshold: float

    def draw(
        self, seen: Columns, generator: torch.Generator, rows: Rows = WHOLE
    ) -> tuple[Tensor, Columns]:
        """Random actions ``(B, A)``, ``rows`` of a batch; and what was drawn, for :meth:`score`."""
        raise NotImplementedError

    def score(self, seen: Columns, choice: Columns) -> dict[str, Head]:
        """Every head's log-probability of ``choice``."""
        raise NotImplementedError

    def kept(self, action: Tensor) -> Tensor:
        """Bool, as ``action``: which actions keep what they decide about."""
        return self.rules.keeps(action)

    @property
    def strict(self) -> int:
        """1 if a higher threshold removes more tokens, -1 if fewer."""
        return 1 if self.rules.last_keeps else -1

    def rates(self) -> list[tuple[list[nn.Parameter], float]]:
        """Groups of parameters, and each one's share of the learning rate."""
        return [(list(self.parameters()), 1.0)]

    def shared(self) -> tuple[list[nn.Parameter], tuple[str, str]] | None:
        """Parameters that two heads share, whose gradients may be at odds; or None."""
        return None
