"""Rules: a reduction with agents, and what these see and do."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenenv.game.reduction import Moment, Reduction
from tokenenv.game.rules.observation import Observation
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.tokens import Tokens


class Rules(Reduction):
    """What the agents of one system see and do, and where. Subclasses are frozen dataclasses.

    Attributes:
        token_agents: whether an agent is a visual token, which stays on the roster once it is
            pruned; else agents are one per block, or its candidates.
        merges: whether tokens merge, so that one may stand for several patches.
        default_reward: the reward's name where none is given.
        choices: what the first and the last action of an agent with two actions are called.
        face_defaults: settings that environments take instead of the rules' own defaults.
    """

    token_agents: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    default_reward: ClassVar[str] = "dora"
    choices: ClassVar[tuple[str, str]] = ("prune", "keep")
    face_defaults: ClassVar[dict[str, Any]] = {}

    @property
    def by_count(self) -> bool:
        """Whether one agent per image chooses how many tokens go; action 0 removes none."""
        return False

    @property
    def last_keeps(self) -> bool:
        """Whether the last action keeps tokens, and not the first."""
        return not (self.by_count or self.merges)

    def keeps(self, action: Tensor) -> Tensor:
        """Bool, as ``action``: which actions keep what they decide about."""
        return action != 0 if self.last_keeps else action == 0

    @classmethod
    def decision_blocks(cls, depth: int, max_cycles: int | None) -> tuple[int, ...]:
        """Where agents decide in a model of ``depth`` blocks if nobody names the blocks.

        Raises:
            UserError: the model has no room for ``max_cycles`` decisions.
        """
        raise NotImplementedError

    def agents(self, backbone: Backbone) -> int:
        """Number A of agents on the roster of one image."""
        raise NotImplementedError

    def actions(self, backbone: Backbone) -> int:
        """Number of actions of an agent."""
        return 2

    def deciders(self, visual: Tensor) -> Tensor:
        """Number of agents that decide about ``visual`` tokens (float tensor of any shape)."""
        raise NotImplementedError

    def layout(self, backbone: Backbone) -> dict[str, slice]:
        """Where each feature lies in what an agent sees of its own."""
        raise NotImplementedError

    def agent_dim(self, backbone: Backbone) -> int:
        """Number F of features per agent."""
        return max((s.stop for s in self.layout(backbone).values()), default=0)

    def shared_dim(self, backbone: Backbone) -> int:
        """Number G of features that all agents of an image see beside their own."""
        return 0

    def state_dim(self, backbone: Backbone) -> int:
        """Number S of features of the image's global state."""
        raise NotImplementedError

    def observe(self, backbone: Backbone, moment: Moment, *, state: bool = False) -> Observation:
        """What the agents see, as the tokens lie now.

        ``state``: whether to add the image's global state, which a critic reads in training.
        """
        raise NotImplementedError

    def to_roster(self, backbone: Backbone, tokens: Tokens, values: Tensor) -> Tensor:
        """Values ``(B, a, ...)`` as the tokens lie -> ``(B, A, ...)`` by agent."""
        return values

    def from_roster(self, tokens: Tokens, values: Tensor) -> Tensor:
        """Values ``(B, A, ...)`` by agent -> as the tokens lie."""
        return values

    def macs(self, backbone: Backbone, block: int, tokens: Tensor) -> Tensor:
        """Multiply-adds of observing and acting on ``tokens`` (float, prefix included)."""
        return torch.zeros_like(tokens)
