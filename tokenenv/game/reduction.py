"""A reduction: in which blocks tokens leave or merge, what that reads, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenenv.vit.backbone import Backbone, Context
from tokenenv.vit.reduction import Match
from tokenenv.vit.tokens import Tokens


@dataclass(frozen=True)
class Moment:
    """The place in a model at which a decision is due for ``B`` images.

    Attributes:
        tokens: ``(B, N)`` tokens now.
        step: which decision of the episode, from 0.
        context: of the attention last run.
        counts: ``(B,)`` visual tokens before the first decision and after each one taken.
        match: candidate pairs, for reductions that prepare them.
    """

    tokens: Tokens
    step: int
    context: Context
    counts: tuple[Tensor, ...]
    match: Match | None = None


class Reduction:
    """What removes or merges tokens between the stages of a model.

    An :class:`~tokenenv.game.episode.Episode` runs one. With agents that decide it is
    :class:`~tokenenv.game.rules.Rules`; without, a :class:`~tokenenv.reducers.Reducer`.

    Attributes:
        blocks: indices of the blocks where tokens may go, strictly increasing.
        between: whether that is between a block's attention and its MLP, not before the block.
        packed: whether :meth:`prepare` and :meth:`apply` also take packed tokens; :meth:`apply`
            then gives packed tokens, too.
    """

    blocks: tuple[int, ...]
    between: ClassVar[bool] = True
    packed: bool = False

    def check(self, backbone: Backbone) -> None:
        """Raise :class:`~tokenenv.errors.UserError` where this doesn't fit the backbone."""

    def wants(self, block: int) -> dict[str, bool]:
        """What the attention of ``block`` has to yield: arguments of ``Backbone.attend``."""
        return {}

    def resize(self, backbone: Backbone, images: Tensor) -> tuple[Backbone, Tensor]:
        """The model and the images ``(B, C, H, W)`` to run: as given, but for another size."""
        return backbone, images

    def prepare(self, tokens: Tokens, context: Context) -> Match | None:
        """Candidate pairs of the decision that is due, for reductions that merge."""
        return None

    def apply(self, moment: Moment, action: Tensor | None) -> Tokens:
        """The tokens ``(B, N)`` after a decision.

        Args:
            moment: where it is due.
            action: what agents chose, as the tokens lie now; None where there are no agents.
        """
        raise NotImplementedError

    def macs(self, backbone: Backbone, block: int, tokens: Tensor) -> Tensor:
        """Multiply-adds of preparing and applying on ``tokens`` (float, prefix included)."""
        return torch.zeros_like(tokens)
