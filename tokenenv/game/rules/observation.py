"""What agents see when a decision is due."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Observation:
    """One decision of ``B`` images with up to ``A`` agents each.

    Attributes:
        agents: ``(B, A, F)`` what each agent sees of itself; zeros for an agent that may not act.
        shared: ``(B, G)`` what every agent of an image sees beside it; G may be 0.
        active: ``(B, A)`` bool, which agents may act. The action of the others is ignored.
        step: which decision of the episode, from 0.
        layout: where each named feature lies in the last dimension of ``agents``.
        legal: ``(B, A, actions)`` bool, what each may do; None where it is anything for the
            active.
        state: ``(B, S)`` the image's global state, for a centralised critic in training;
            None where it was not asked for.
        tokens: ``(B, N, D)`` all living tokens, zeros for the others, for a critic that reads
            them; None where none does.
    """

    agents: Tensor
    shared: Tensor
    active: Tensor
    step: int
    layout: dict[str, slice]
    legal: Tensor | None = None
    state: Tensor | None = None
    tokens: Tensor | None = None

    def feature(self, name: str) -> Tensor:
        """``(B, A, f)`` one named feature."""
        return self.agents[..., self.layout[name]]
