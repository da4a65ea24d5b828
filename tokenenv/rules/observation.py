"""What the agents of a batch of images see."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Observation:
    """One decision of ``B`` images with up to ``A`` agents each.

    Attributes:
        agents: ``(B, A, F)`` what each agent sees of itself; zeros for an agent that may not act.
        shared: ``(B, G)`` what every agent of an image sees beside it; G may be 0.
        active: ``(B, A)`` bool, who may act. The action of the others is ignored.
        step: which decision of the episode, from 0.
        layout: where each named feature lies in the last dimension of ``agents``.
        state: ``(B, S)`` the image's global state, for a centralised critic in training; None
            where nobody learns.
    """

    agents: Tensor
    shared: Tensor
    active: Tensor
    step: int
    layout: dict[str, slice]
    state: Tensor | None = None

    def feature(self, name: str) -> Tensor:
        """``(B, A, f)`` one named feature."""
        return self.agents[..., self.layout[name]]
