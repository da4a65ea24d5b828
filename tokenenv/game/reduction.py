"""A reduction: in which blocks tokens are pruned or merged, what that reads, what it costs."""

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
    """The state of ``B`` images when a decision is due.

    Attributes:
        tokens: ``(B, N)`` tokens now.
        step: which decision of the episode, from 0.
        context: keys, attention and so on of the last attention that ran.
        counts: ``(B,)`` visual tokens before the first decision and after each one taken.
        match: candidate pairs, for reductions that prepare them.
        left: number of tokens that every image will have after the decision, prefix included, if
            that is known before.
    """

    tokens: Tokens
    step: int
    context: Context
    counts: tuple[Tensor, ...]
    match: Match | None = None
    left: int | None = None


class Reduction:
    """What prunes or merges tokens between the stages of a model.

    An :class:`~tokenenv.game.episode.Episode` runs it. :class:`~tokenenv.game.rules.Rules` are
    reductions with agents, a :class:`~tokenenv.reducers.Reducer` is one without.

    Attributes:
        blocks: indices of the blocks where tokens may be removed, strictly increasing.
        between: True: between a block's attention and its MLP; False: before the block.
        packed: whether :meth:`prepare` and :meth:`apply` also take packed tokens; :meth:`apply`
            then returns packed tokens, too.
        traces: whether it may read which token stands for which patch (``Tokens.source``); without
            that, passes that only need logits don't keep track of it.
        reorders: whether it may move tokens also where it removes none.
        keeps_prefix: whether it leaves the embeddings of prefix tokens as they are. A decision in
            the last block then changes no logits of a model that reads only these.
    """

    blocks: tuple[int, ...]
    between: ClassVar[bool] = True
    packed: bool = False
    traces: bool = True
    reorders: bool = False
    keeps_prefix: ClassVar[bool] = True

    def check(self, backbone: Backbone) -> None:
        """Raise :class:`~tokenenv.errors.UserError` if the reduction doesn't fit the backbone."""

    def wants(self, block: int) -> dict[str, bool]:
        """What the attention of ``block`` must return: arguments of ``Backbone.attend``."""
        return {}

    def resize(self, backbone: Backbone, images: Tensor) -> tuple[Backbone, Tensor]:
        """The model and images ``(B, C, H, W)`` to run instead; by default those given."""
        return backbone, images

    def prepare(self, tokens: Tokens, context: Context) -> Match | None:
        """Candidate pairs of the decision that is due, for reductions that merge."""
        return None

    def apply(self, moment: Moment, action: Tensor | None) -> Tokens:
        """The tokens ``(B, N)`` after a decision.

        Args:
            moment: the state when the decision is due.
            action: the agents' actions, in the current order of the tokens; None without agents.
        """
        raise NotImplementedError

    def macs(self, backbone: Backbone, block: int, tokens: Tensor) -> Tensor:
        """Multiply-adds of :meth:`prepare` and :meth:`apply`.

        Args:
            backbone: the model.
            block: the decision's block.
            tokens: float number of tokens, prefix included, any shape.

        Returns:
            As ``tokens``.
        """
        return torch.zeros_like(tokens)
