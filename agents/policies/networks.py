"""Small networks that are applied to each agent with the same weights."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn


class SharedMLP(nn.Module):
    """A perceptron applied to each agent, with the agent's own and the shared features as input.

    The first layer is split so that the shared features are multiplied once per image, not once
    per agent, which costs ``G x hidden`` instead of ``A x G x hidden``. Hidden layers are Linear,
    LayerNorm, ReLU with orthogonal initialisation (as in on-policy's MAPPO networks).

    Args:
        own: width F of an agent's own features.
        shared: width G of the shared features, may be 0.
        hidden: widths of the hidden layers, at least one.
        out: outputs per agent.
        gain: gain of the last layer's orthogonal initialisation.
    """

    def __init__(
        self, own: int, shared: int, hidden: Sequence[int], out: int, *, gain: float
    ) -> None:
        super().__init__()
        self.own = _linear(own, hidden[0], 2**0.5)
        self.shared = _linear(shared, hidden[0], 2**0.5, bias=False) if shared else None
        self.first_norm = nn.LayerNorm(hidden[0])
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(hidden):
            layers += [_linear(before, after, 2**0.5), nn.LayerNorm(after), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = _linear(hidden[-1], out, gain)

    def forward(self, own: Tensor, shared: Tensor) -> Tensor:
        """``own (..., A, F)`` and ``shared (..., G)`` -> ``(..., A, out)``."""
        h = self.own(own)
        if self.shared is not None:
            h = h + self.shared(shared)[..., None, :]
        return self.head(self.body(self.first_norm(h).relu()))

    def macs(self, agents: Tensor) -> Tensor:
        """Multiply-adds per image; ``agents``: float number of its agents, any shape."""
        per_agent = sum(
            m.weight.numel()
            for name, m in self.named_modules()
            if isinstance(m, nn.Linear) and name != "shared"
        )
        once = self.shared.weight.numel() if self.shared is not None else 0
        return agents * per_agent + once


def _linear(inputs: int, outputs: int, gain: float, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.orthogonal_(layer.weight, gain)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
