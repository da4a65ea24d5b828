"""The interface of policies that PPO trains: sample actions, and score them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from agents.workers import WHOLE, Rows
from tokenenv.game.policy import Policy
from tokenenv.game.rules import Observation

Columns = dict[str, Tensor]
"""Tensors of a batch by name, with the same first dimensions."""


def columns(observation: Observation) -> Columns:
    """The tensors of an observation by field name, without those that are None."""
    names = ("agents", "shared", "active", "state", "legal", "tokens")
    found = {name: getattr(observation, name) for name in names}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


class Head(NamedTuple):
    """One head of an action: ``(B, K)`` log-probabilities, entropies, and which entries count."""

    log_prob: Tensor
    entropy: Tensor
    mask: Tensor


class Trainable(nn.Module, Policy):
    """A policy that PPO can train.

    Attributes:
        heads: names of the heads, the parts of an action; the first one is used in every step.
    """

    heads: tuple[str, ...]
    threshold: float

    def draw(
        self, seen: Columns, generator: torch.Generator, rows: Rows = WHOLE
    ) -> tuple[Tensor, Columns]:
        """Sample actions ``(B, A)`` for ``rows`` of a batch; also the choice for :meth:`score`."""
        raise NotImplementedError

    def score(self, seen: Columns, choice: Columns) -> dict[str, Head]:
        """For every head the log-probabilities and entropies of ``choice``."""
        raise NotImplementedError

    def kept(self, action: Tensor) -> Tensor:
        """Which actions keep tokens: bool of the shape of ``action``."""
        return self.rules.keeps(action)

    @property
    def strict(self) -> int:
        """1 if a higher threshold removes more tokens, -1 if fewer."""
        return 1 if self.rules.last_keeps else -1

    def rates(self) -> list[tuple[list[nn.Parameter], float]]:
        """Groups of parameters, each with its factor of the learning rate."""
        return [(list(self.parameters()), 1.0)]

    def shared(self) -> tuple[list[nn.Parameter], tuple[str, str]] | None:
        """Parameters that two heads share, for PCGrad; None if there are none."""
        return None
