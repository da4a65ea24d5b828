"""Rules: a reduction with agents, and what the agents observe and do."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenenv.game.reduction import Moment, Reduction
from tokenenv.game.rules.observation import Observation
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.tokens import Tokens


class Rules(Reduction):
    """What the agents of a game observe and do, and in which blocks.

    Subclasses are frozen dataclasses. "Roster order" below means one entry per agent, ``(B, A)``,
    whether or not it may act; the current order of the tokens may be shorter and different.

    Attributes:
        token_agents: whether there is one agent per visual token, which stays in the roster once
            its token is pruned; else the agents belong to a block.
        merges: whether tokens are merged, so that a token may stand for several patches.
        default_reward: name of the reward if none is given.
        choices: what the first and the last action of an agent with two actions are called.
        face_defaults: settings that environments use instead of the rules' own defaults.
    """

    token_agents: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    default_reward: ClassVar[str] = "dora"
    choices: ClassVar[tuple[str, str]] = ("prune", "keep")
    face_defaults: ClassVar[dict[str, Any]] = {}

    @property
    def by_count(self) -> bool:
        """Whether one agent per image chooses how many tokens to remove; action 0 removes none."""
        return False

    @property
    def last_keeps(self) -> bool:
        """Whether the last action keeps tokens; else the first one does."""
        return not (self.by_count or self.merges)

    def keeps(self, action: Tensor) -> Tensor:
        """Which actions keep tokens: bool of the shape of ``action``."""
        return action != 0 if self.last_keeps else action == 0

    @classmethod
    def decision_blocks(cls, depth: int, max_cycles: int | None) -> tuple[int, ...]:
        """The default decision blocks in a model of ``depth`` blocks.

        Raises:
            UserError: the model has no room for ``max_cycles`` decisions.
        """
        raise NotImplementedError

    def agents(self, backbone: Backbone) -> int:
        """Number A of agents of one image."""
        raise NotImplementedError

    def actions(self, backbone: Backbone) -> int:
        """Number of actions of an agent."""
        return 2

    def deciders(self, visual: Tensor) -> Tensor:
        """Number of agents that act when there are ``visual`` tokens (float, any shape)."""
        raise NotImplementedError

    def layout(self, backbone: Backbone) -> dict[str, slice]:
        """The slice of each named feature in an agent's own ``F`` features."""
        raise NotImplementedError

    def agent_dim(self, backbone: Backbone) -> int:
        """Number F of features per agent."""
        return max((s.stop for s in self.layout(backbone).values()), default=0)

    def shared_dim(self, backbone: Backbone) -> int:
        """Number G of features that all agents of an image share."""
        return 0

    def state_dim(self, backbone: Backbone) -> int:
        """Number S of features of the image's global state."""
        raise NotImplementedError

    def observe(self, backbone: Backbone, moment: Moment, *, state: bool = False) -> Observation:
        """What the agents observe, in the current order of the tokens.

        Args:
            backbone: the model.
            moment: the state when the decision is due.
            state: whether to add the image's global state, which a critic reads in training.
        """
        raise NotImplementedError

    def to_roster(self, backbone: Backbone, tokens: Tokens, values: Tensor) -> Tensor:
        """Values ``(B, a, ...)`` in the tokens' order -> ``(B, A, ...)`` in roster order."""
        return values

    def from_roster(self, tokens: Tokens, values: Tensor) -> Tensor:
        """Values ``(B, A, ...)`` in roster order -> ``(B, a, ...)`` in the tokens' order."""
        return values

    def macs(self, backbone: Backbone, block: int, tokens: Tensor) -> Tensor:
        """Multiply-adds of observing and applying; arguments as for a reduction."""
        return torch.zeros_like(tokens)
