"""EViT: the tokens that the class token attends to stay, the others become one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenenv import reduction
from tokenenv.backbone import Backbone, Context
from tokenenv.reducers.base import Reducer
from tokenenv.rewards import check_keep
from tokenenv.tokens import Tokens


@dataclass(frozen=True)
class EViT(Reducer):
    """Liang et al., ICLR 2022, section 3.2, between attention and MLP.

    The ``ceil(keep n)`` of an image's ``n`` visual tokens with the highest attention of the class
    token (mean over heads) stay; the others fuse into one token, their mean weighted by that
    attention. A token fused earlier competes like any other.

    Attributes:
        keep: share of the tokens that stays, in (0, 1].
        fuse: whether the others fuse; without it they leave.
    """

    keep: float = 0.7
    fuse: bool = True
    needs_class_token: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep)

    def wants(self, block: int) -> dict[str, bool]:
        """The class token's attention where tokens leave."""
        return {"cls_attention": block in self.blocks}

    def macs(self, backbone: Backbone, block: int, tokens: Tensor) -> Tensor:
        """The class token's row of attention, and the fused token's mean."""
        left = (tokens - backbone.prefix) * (1 - self.keep)
        return tokens * backbone.attention_dim(block) + left * backbone.dim * self.fuse

    def reduce(self, tokens: Tokens, context: Context, step: int) -> Tokens:
        """Keep the attended, fuse the others."""
        assert context.cls_attention is not None
        score = context.cls_attention[:, tokens.prefix :]
        alive = tokens.visual_alive
        count = (alive.sum(1, keepdim=True) * self.keep).ceil()
        stays = reduction.highest(score.masked_fill(~alive, -torch.inf), count)
        if not self.fuse:
            return reduction.prune(tokens, stays)
        # The others meet in the first of them: a token slot that is free.
        goes = alive & ~stays
        first = goes.to(torch.uint8).argmax(1, keepdim=True)
        place = torch.arange(goes.shape[1], device=goes.device).expand_as(goes)
        match = reduction.Match(
            token=place + tokens.prefix,
            partner=(first + tokens.prefix).expand_as(place),
            score=score,
        )
        return reduction.merge(tokens, match, goes & (place != first), weight=context.cls_attention)
