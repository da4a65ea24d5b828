"""A cooperative variant of RL4EViT's reward; ours, not the paper's."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from tokenenv.game.rewards.base import Computation, Reward, Turn


@dataclass(frozen=True)
class Cooperative(Reward):
    """A cooperative variant of alpha/beta that pays all agents, also those of pruned tokens.

    RL4EViT pays only the agents of kept tokens. An agent then earns nothing by being pruned in
    favour of a more useful token, and what it earns by being kept hardly depends on its token's
    content. Here every agent gets ``alpha`` times the fidelity to the dense model's prediction at
    the end, and pays ``beta`` at each decision that keeps its token.

    Attributes:
        alpha: weight of the fidelity.
        beta: price of a kept token per decision.
        shared: whether all agents of an image share the price, each paying the mean over the P
            agents. All then get the same reward, as team learners expect. Keeping a token costs
            each agent a P-th of ``beta`` then, so the same balance needs P times the ``beta``.
        computation: its weights multiply ``beta`` decision by decision; None: all weigh 1.
    """

    alpha: float = 1.0
    beta: float = 0.002
    shared: bool = False
    computation: Computation | None = None

    def __call__(self, turn: Turn) -> Tensor:
        """Rewards ``(B, A)``."""
        weight = 1.0 if self.computation is None else self.computation.weights[turn.step]
        reward = -self.beta * weight * turn.after.float()
        if self.shared:
            reward = reward.mean(1, keepdim=True).expand_as(reward)
        if turn.outcome is not None:
            reward = reward + self.alpha * turn.outcome.fidelity[:, None]
        return reward

    @classmethod
    def fits(cls, token_agents: bool) -> bool:
        """Whether the game has one agent per token."""
        return token_agents

    @property
    def price(self) -> float:
        """``beta``."""
        return self.beta

    def with_price(self, price: float) -> Cooperative:
        """The same reward with another ``beta``."""
        return replace(self, beta=price)

    def priced_by(self, computation: Computation) -> Cooperative:
        """The same reward with ``computation``."""
        return replace(self, computation=computation)
