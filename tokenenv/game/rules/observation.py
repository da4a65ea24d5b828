"""What agents observe when a decision is due."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Observation:
    """One decision of ``B`` images with up to ``A`` agents each.

    Attributes:
        agents: ``(B, A, F)`` each agent's own features; zeros for an agent that may not act.
        shared: ``(B, G)`` features that all agents of an image share; G may be 0.
        active: ``(B, A)`` bool, which agents may act. The actions of the others are ignored.
        step: which decision of the episode, from 0.
        layout: the slice of each named feature in the last dimension of ``agents``.
        legal: ``(B, A, actions)`` bool, which actions are legal; None: all of an active agent.
        state: ``(B, S)`` the image's global state, for a centralised critic in training;
            None if it was not asked for.
        tokens: ``(B, N, D)`` the tokens that are left, zeros for the others, for a critic that
            reads tokens; None in games that are not ``privileged``.
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
        """``(B, A, f)`` the feature ``name``; f is its width."""
        return self.agents[..., self.layout[name]]
