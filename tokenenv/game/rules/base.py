"""What the game needs of a system's rules."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from tokenenv.game.rules.observation import Moment, Observation
from tokenenv.vit.backbone import Backbone, Context
from tokenenv.vit.reduction import Match
from tokenenv.vit.tokens import Tokens


class Rules(Protocol):
    """What the agents of one system see and do, and where."""

    @property
    def blocks(self) -> tuple[int, ...]:
        """The decision blocks, strictly increasing."""

    @property
    def between(self) -> bool:
        """Whether decisions fall between a block's attention and its MLP, not before the block."""

    @property
    def packed(self) -> bool:
        """Whether :meth:`match`, :meth:`observe` and :meth:`apply` also take packed tokens.

        :meth:`apply` then gives packed tokens, too.
        """

    def check(self, backbone: Backbone) -> None:
        """Raise :class:`~tokenenv.errors.UserError` where the rules don't fit the backbone."""

    def wants(self, block: int) -> dict[str, bool]:
        """What the attention of ``block`` has to do: arguments of ``Backbone.attend``."""

    def agents(self, backbone: Backbone) -> int:
        """A: agents on the roster of one image."""

    def actions(self, backbone: Backbone) -> int:
        """How many actions an agent has."""

    def layout(self, backbone: Backbone) -> dict[str, slice]:
        """Where each feature lies in an agent's observation."""

    def agent_dim(self, backbone: Backbone) -> int:
        """F: numbers in what an agent sees of its own."""

    def shared_dim(self, backbone: Backbone) -> int:
        """G: numbers every agent of an image sees beside its own."""

    def state_dim(self, backbone: Backbone) -> int:
        """S: numbers of the image's global state."""

    def match(self, tokens: Tokens, context: Context) -> Match | None:
        """Candidate pairs of the decision that is due, for rules that merge."""

    def observe(self, backbone: Backbone, moment: Moment, *, state: bool = False) -> Observation:
        """What the agents see, as the tokens lie now; ``state``: whether to add the state."""

    def apply(self, moment: Moment, action: Tensor) -> Tokens:
        """What ``action``, as the tokens lie now, makes of the tokens."""

    def to_roster(self, backbone: Backbone, tokens: Tokens, values: Tensor) -> Tensor:
        """Values ``(B, a, ...)`` as the tokens lie -> ``(B, A, ...)`` on the roster."""

    def from_roster(self, tokens: Tokens, values: Tensor) -> Tensor:
        """Values ``(B, A, ...)`` on the roster -> as the tokens lie."""

    def deciders(self, visual: Tensor) -> Tensor:
        """How many agents decide about ``visual`` tokens (float tensor of any shape)."""

    def macs(self, backbone: Backbone, block: int, tokens: Tensor) -> Tensor:
        """Multiply-adds of observing and acting on ``tokens`` (float, prefix included)."""
