"""MAPPO (Yu et al. 2022): PPO for agents that share one actor and one centralised critic."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from agents.learners.arena import Arena
from agents.learners.ppo import PPO, PPOConfig
from agents.policies.actor import ActorPolicy
from agents.policies.networks import SharedMLP
from agents.policies.trainable import Columns
from agents.workers import ALONE, Workers
from tokenenv.game.dense import CONFIDENCE_DIM, LABELLED


@dataclass(frozen=True)
class MAPPOConfig(PPOConfig):
    """Settings of :class:`MAPPO`.

    Attributes:
        hidden: widths of the critic's hidden layers.
        centralised: whether the critic reads the global state; without it this is IPPO, in which
            each agent has, with ``repeats``, a baseline of its own.
        labels: whether it also reads the two numbers of a game's state that need the label, see
            :func:`~tokenenv.game.dense.confidence`. They are the first two of the last three.
    """

    hidden: tuple[int, ...] = (64, 64)
    centralised: bool = True
    labels: bool = True

    @property
    def own_baseline(self) -> bool:
        """Whether each agent's baseline holds its own advantages alone: in IPPO."""
        return not self.centralised


class MAPPO(PPO):
    """Trains an :class:`ActorPolicy` in an arena.

    The critic reads the agent's own observation and the image's global state (an agent-specific
    global state). Actor and critic have separate Adam optimisers. Inactive agents are masked out of
    losses, statistics and advantages.

    Args:
        policy: the actor to train, in place.
        arena: the game.
        config: settings.
        seed: seed of action sampling and minibatch order.
        workers: the processes that train together, see :class:`~agents.learners.ppo.PPO`.
    """

    def __init__(
        self,
        policy: ActorPolicy,
        arena: Arena,
        config: MAPPOConfig,
        *,
        seed: int = 0,
        workers: Workers = ALONE,
    ) -> None:
        critic = AgentCritic(policy, config).to(next(policy.parameters()).device)
        super().__init__(policy, critic, arena, config, seed=seed, workers=workers)


class AgentCritic(nn.Module):
    """A value for each agent, from its own observation and the global state."""

    def __init__(self, policy: ActorPolicy, config: MAPPOConfig) -> None:
        super().__init__()
        self.centralised = config.centralised
        state = policy.widths.state if config.centralised else 0
        self.hidden = slice(0, 0)
        if state and not config.labels:
            first = state - CONFIDENCE_DIM
            self.hidden, state = slice(first, first + LABELLED), state - LABELLED
        self.value = SharedMLP(policy.widths.own, state, config.hidden, 1, gain=1.0)

    def forward(self, seen: Columns, choice: Columns | None) -> dict[str, Tensor]:
        """Normalised values ``(B, A)`` for the only head, ``action``."""
        state = seen["state"] if self.centralised else seen["state"][..., :0]
        if self.hidden.stop:
            state = torch.cat([state[..., : self.hidden.start], state[..., self.hidden.stop :]], -1)
        return {"action": self.value(seen["agents"], state)[..., 0]}
