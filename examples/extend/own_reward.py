"""A reward of your own that needs a measurement: how sure of the dense class the model still is.

    python examples/extend/own_reward.py

After every decision the blocks that are left are run once more, without further pruning, and the
probability of the class that the dense model names is read from the logits. Each agent is paid for
what its image gained or lost in that step, less a price for staying.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import tokenenv
from agents import MAPPO, ActorPolicy, MAPPOConfig, Widths
from tokenenv.game.rewards import Probe, Reward, Turn, register_reward


@register_reward("confidence")
@dataclass(frozen=True)
class Confidence(Reward):
    """The change of the dense class's probability, less ``price`` for each agent that stays.

    Attributes:
        price: of one agent for one decision.
    """

    price: float = 0.01

    def measure(self, probe: Probe) -> Tensor:
        """``(B,)`` probability of the dense model's class if nothing more were pruned."""
        images = torch.arange(len(probe.dense), device=probe.dense.device)
        probability = probe.finish(images).float().softmax(1)
        return probability.gather(1, probe.dense.argmax(1, keepdim=True))[:, 0]

    def __call__(self, turn: Turn) -> Tensor:
        """Rewards ``(B, A)``."""
        now = turn.measured[-1]
        before = turn.measured[-2] if turn.step else torch.ones_like(now)
        return (now - before)[:, None] - self.price * turn.after.float()

    @classmethod
    def fits(cls, token_agents: bool) -> bool:
        """For games of one agent per token."""
        return token_agents


def main(updates: int = 5) -> None:
    """Train for some updates, and print the mean reward and the share of tokens kept."""
    torch.manual_seed(0)
    game = tokenenv.build_game(reward="confidence", reward_kwargs={"price": 0.02}, batch_size=32)
    widths = Widths(game.agent_dim, game.shared_dim, game.state_dim)
    policy = ActorPolicy(game.rules, widths, initial=0.9, trained_on="digits_vit")
    learner = MAPPO(policy, game, MAPPOConfig(steps=game.steps), seed=0)
    for update in range(updates):
        found = learner.update()
        print(f"update {update}: reward {found['reward']:.4f}, keeps {found['keep']:.3f}")


if __name__ == "__main__":
    main()
