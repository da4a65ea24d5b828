"""Our own cooperative form of RL4EViT's reward."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from tokenenv.game.rewards.base import Reward, Turn


@dataclass(frozen=True)
class Cooperative(Reward):
    """Our own cooperative form of alpha/beta: everyone is paid for the prediction, dead or alive.

    RL4EViT pays the survivors only, so a token that matters earns nothing by leaving a place to
    a better one, and what a token gains by staying hardly depends on what it shows. Here every
    agent, alive or not, gets ``alpha`` times the fidelity to the dense model's prediction at the
    end, and pays ``beta`` for each further share of the computation it uses itself.

    Attributes:
        alpha: weight of the fidelity.
        beta: price of staying alive from one decision to the next.
        shared: whether the price is shared too: each pays the mean over the image's P agents.
            Then all get the same reward, as learners of one team expect. The same balance of
            price and fidelity has P times the ``beta``: what an agent's stay costs each is a P-th.
    """

    alpha: float = 1.0
    beta: float = 0.002
    shared: bool = False

    def __call__(self, turn: Turn) -> Tensor:
        """Rewards ``(B, A)``."""
        reward = -self.beta * turn.after.float()
        if self.shared:
            reward = reward.mean(1, keepdim=True).expand_as(reward)
        if turn.outcome is not None:
            reward = reward + self.alpha * turn.outcome.fidelity[:, None]
        return reward

    @classmethod
    def fits(cls, token_agents: bool) -> bool:
        """Games of one agent per token."""
        return token_agents

    @property
    def price(self) -> float:
        """``beta``."""
        return self.beta

    def with_price(self, price: float) -> Cooperative:
        """The same reward with another ``beta``."""
        return replace(self, beta=price)
