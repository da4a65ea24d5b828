"""A system of your own: a reward, and a class of settings that says what is trained with it.

    python examples/extend/own_system.py
    tokenenv train examples/extend/own_system.py:LikelihoodConfig --set target_saving=50
    tokenenv evaluate runs/own_system-py-LikelihoodConfig-0

Every token of the embedded digits decides three times whether it stays, as in RL4EViT. Here all of
them are paid for the probability that the reduced model gives to the true class, where RL4EViT's
agents are paid for a right answer. ``from agents.systems import register_system`` and
``@register_system("likelihood")`` above the class give it a name for :func:`tokenenv.train`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import tokenenv
from agents.learners.mappo import AgentCritic, MAPPOConfig
from agents.policies.actor import ActorPolicy, Widths
from agents.systems import PolicyConfig
from tokenenv.data import ImageSource
from tokenenv.game import Game
from tokenenv.game.rewards import Reward, Turn
from tokenenv.vit.backbone import Backbone


@dataclass(frozen=True)
class Likelihood(Reward):
    """The log-probability of the true class at the end, less what staying costs.

    Attributes:
        price: of staying from one decision to the next; the closed loop changes it by
            :meth:`with_price`.
        worst: the log-probability below which a prediction is no worse.
    """

    price: float = 1e-4
    worst: float = -3.0

    def __call__(self, turn: Turn) -> Tensor:
        """Rewards ``(B, A)``, of ``B`` images and ``A`` tokens."""
        reward = -self.price * turn.after.float()
        if turn.outcome is not None:
            log_prob = turn.outcome.logits.float().log_softmax(1)
            true = log_prob.gather(1, turn.outcome.labels[:, None])
            reward = reward + true.clamp(min=self.worst)
        return reward

    def with_price(self, price: float) -> Likelihood:
        """The same reward with another price."""
        return dataclasses.replace(self, price=price)


@dataclass(frozen=True)
class LikelihoodConfig(PolicyConfig):
    """What ``--set key=value`` and keyword arguments of ``train`` can set.

    Attributes:
        price: of staying from one decision to the next, before training.
        hidden: widths of the actor's and critic's hidden layers.
        initial_keep: probability of keeping a token before training.
    """

    updates: int = 40
    target_saving: float = 45.0
    held_back: float = 0.3
    evaluate_every: int = 10
    lr: float = 3e-3
    price: float = 1e-4
    hidden: tuple[int, ...] = (32, 32)
    initial_keep: float = 0.9

    def game(self, backbone: Backbone, source: ImageSource) -> Game:
        """One agent per token, before three blocks unless ``blocks`` says others."""
        return tokenenv.build_game(
            rules="token_prune",
            model=backbone,
            data=source,
            blocks=self.blocks or None,
            features=("position", "progress", "cls_attention", "redundancy", "norm"),
            reward=Likelihood(self.price),
            batch_size=self.batch,
            repeats=self.repeats,
        )

    def policy(self, game: Game, model: str) -> ActorPolicy:
        """One network for all agents."""
        policy = ActorPolicy(
            game.rules,
            Widths(game.agent_dim, game.shared_dim, game.state_dim),
            hidden=self.hidden,
            initial=self.initial_keep,
            trained_on=model,
        )
        return policy.to(game.backbone.device)

    def make_critic(self, policy: ActorPolicy, game: Game) -> AgentCritic:
        """MAPPO's: a value for each agent, from its own view and the global state."""
        return AgentCritic(policy, MAPPOConfig(hidden=self.hidden))


def main(**options: Any) -> tokenenv.Run:
    """Train; ``options`` are those of :func:`tokenenv.train`."""
    run = tokenenv.train(f"{__file__}:LikelihoodConfig", **options)
    print(run)
    return run


if __name__ == "__main__":
    main()
