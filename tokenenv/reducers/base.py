"""What all reducers have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenenv.backbone import Backbone, Context
from tokenenv.errors import UserError
from tokenenv.reduction import Match
from tokenenv.rules.checks import check_blocks, check_range
from tokenenv.rules.observation import Moment, Observation
from tokenenv.tokens import Tokens


@dataclass(frozen=True)
class Reducer(ABC):
    """Rules under which nobody decides anything: a fixed method says which tokens go on.

    Attributes:
        blocks: indices of the blocks that reduce, strictly increasing.
    """

    blocks: tuple[int, ...]
    between: ClassVar[bool] = True
    needs_class_token: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_blocks(self.blocks)

    @abstractmethod
    def reduce(self, tokens: Tokens, context: Context, step: int) -> Tokens:
        """The tokens that go on; dead ones may lie anywhere. ``step``: which reduction it is."""

    @abstractmethod
    def wants(self, block: int) -> dict[str, bool]:
        """What the attention of ``block`` has to do: arguments of ``Backbone.attend``."""

    @abstractmethod
    def macs(self, backbone: Backbone, block: int, tokens: Tensor) -> Tensor:
        """Multiply-adds of reducing ``tokens`` (float, prefix included)."""

    def check(self, backbone: Backbone) -> None:
        """Raise :class:`UserError` where the method doesn't fit the backbone."""
        check_range(self.blocks, backbone.depth)
        if self.needs_class_token and not backbone.has_class_token:
            raise UserError(
                f"{type(self).__name__} ranks tokens by the class token's attention and this model "
                "has no class token: take a method without it, such as tome:r=8"
            )

    def agents(self, backbone: Backbone) -> int:
        """Nobody."""
        return 0

    def actions(self, backbone: Backbone) -> int:
        """Nothing to choose."""
        return 1

    def deciders(self, visual: Tensor) -> Tensor:
        """None."""
        return torch.zeros_like(visual)

    def layout(self, backbone: Backbone) -> dict[str, slice]:
        """Nothing is observed."""
        return {}

    def agent_dim(self, backbone: Backbone) -> int:
        """F."""
        return 0

    def shared_dim(self, backbone: Backbone) -> int:
        """G."""
        return 0

    def state_dim(self, backbone: Backbone) -> int:
        """S."""
        return 0

    def match(self, tokens: Tokens, context: Context) -> Match | None:
        """Nobody is asked about pairs."""
        return None

    def to_roster(self, backbone: Backbone, tokens: Tokens, values: Tensor) -> Tensor:
        """The roster is empty."""
        return values

    def from_roster(self, tokens: Tokens, values: Tensor) -> Tensor:
        """The roster is empty."""
        return values

    def observe(self, backbone: Backbone, moment: Moment, *, state: bool = False) -> Observation:
        """Nothing, seen by nobody."""
        nothing = moment.tokens.x.new_zeros(len(moment.tokens.x), 0, dtype=torch.float32)
        return Observation(
            agents=nothing[..., None],
            shared=nothing,
            active=nothing.bool(),
            step=moment.step,
            layout={},
            state=nothing if state else None,
        )

    def apply(self, moment: Moment, action: Tensor) -> Tokens:
        """Reduce; there is no action to heed."""
        # What is compared is compared in full precision, also where the model computes in half.
        with torch.autocast(moment.tokens.x.device.type, enabled=False):
            return self.reduce(moment.tokens, moment.context, moment.step)
