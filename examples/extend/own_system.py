"""A system of your own: rules, a reward, and a class of settings that builds what is trained.

    python examples/extend/own_system.py
    tokenenv train examples/extend/own_system.py:LikelihoodConfig --set target_saving=50
    tokenenv evaluate --trust runs/own_system-py-LikelihoodConfig-0

Every token of the embedded digits has an agent that keeps or prunes it three times, as in RL4EViT.
Two things differ: the eight tokens with the most class attention stay whatever their agents do, and
all agents are rewarded by the log-probability of the true class in the reduced model, where
RL4EViT's agents are rewarded for a correct prediction. The saved policy holds the rules, so
``--trust`` is needed to run them from this file again. To give the system a name for
:func:`tokenenv.train`, decorate the class of settings with ``@register_system("likelihood")`` from
``agents.systems``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import tokenenv
from agents.learners.mappo import AgentCritic, MAPPOConfig
from agents.policies.actor import ActorPolicy, Widths
from agents.systems import PolicyConfig
from tokenenv.data import ImageSource
from tokenenv.game import Game
from tokenenv.game.rewards import Reward, Turn
from tokenenv.game.rules import Moment, TokenPrune
from tokenenv.reduction import highest, prune
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.tokens import Tokens


@dataclass(frozen=True)
class LeastPrune(TokenPrune):
    """RL4EViT's rules, but some tokens are left to every image.

    Attributes:
        least: how many tokens stay in any case, those with the most class attention.
    """

    least: int = 8

    def apply(self, moment: Moment, action: Tensor | None) -> Tokens:
        """Prune the other tokens whose action ``(B, N - prefix)`` is 0."""
        tokens, attention = moment.tokens, moment.context.cls_attention
        assert action is not None and attention is not None  # `features` has it
        attention = attention[:, tokens.prefix :].masked_fill(~tokens.visual_alive, -torch.inf)
        return prune(tokens, (action != 0) | highest(attention, self.least))


@dataclass(frozen=True)
class Likelihood(Reward):
    """The log-probability of the true class at the end, minus a price for kept tokens.

    Attributes:
        price: price of a kept token per decision; the closed loop changes it by
            :meth:`with_price`.
        worst: lower bound of the log-probability.
    """

    price: float = 1e-4
    worst: float = -3.0

    def __call__(self, turn: Turn) -> Tensor:
        """Rewards ``(B, A)`` for ``B`` images with ``A`` agents."""
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
    """The settings (``--set key=value``, or keyword arguments of ``train``).

    Attributes:
        price: price of a kept token per decision before training.
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
        """A game with one agent per token; decisions before three blocks by default."""
        features = ("position", "progress", "cls_attention", "redundancy", "norm")
        blocks = self.blocks or LeastPrune.decision_blocks(backbone.depth, None)
        return tokenenv.build_game(
            rules=LeastPrune(blocks, features),
            model=backbone,
            data=source,
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
        """MAPPO's critic: a value for each agent, from its own features and the global state."""
        return AgentCritic(policy, MAPPOConfig(hidden=self.hidden))


def main(**options: Any) -> tokenenv.Run:
    """Train; ``options`` are those of :func:`tokenenv.train`."""
    run = tokenenv.train(f"{__file__}:LikelihoodConfig", **options)
    print(run)
    return run


if __name__ == "__main__":
    main()
