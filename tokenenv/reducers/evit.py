"""EViT: keeps the tokens with the most class attention and fuses the others into one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tokenenv.game.checks import check_keep
from tokenenv.reducers.base import Reducer, share, share_of
from tokenenv.vit import reduction
from tokenenv.vit.backbone import Backbone, Context
from tokenenv.vit.tokens import Tokens


@dataclass(frozen=True)
class EViT(Reducer):
    """EViT (Liang et al., ICLR 2022), without its fine-tuning.

    Between attention and MLP of blocks 3, 6 and 9 of 12 (the paper's layers 4, 7 and 10), the
    ``ceil(keep n)`` visual tokens with the most class attention, mean over the heads, are kept. The
    others are fused into one token, their sum weighted by attention (both section 3), which is a
    token like all others in later blocks. Unlike in the paper, the sum is divided by the sum of the
    weights, because a backbone that was not fine-tuned with EViT expects tokens of the usual norm.

    Attributes:
        blocks: indices of the blocks where tokens are removed, strictly increasing.
        keep: share of an image's visual tokens that is kept in each of these blocks, in (0, 1].
        fuse: whether the others are fused; else they are pruned.

    Raises:
        UserError: a value is out of range.
    """

    blocks: tuple[int, ...] = (3, 6, 9)
    keep: float = 0.7
    fuse: bool = True
    reads: ClassVar[tuple[str, ...]] = ("cls_attention",)
    required: ClassVar[tuple[str, ...]] = ("keep",)
    traces = False
    usage: ClassVar[str] = (
        "evit:keep=0.7[,blocks=3/6/9][,fuse=0]: keeps the top-k by class attention and fuses the "
        "others into one (EViT); fuse=0 prunes them"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep)

    def left(self, backbone: Backbone, step: int, visual: int) -> int:
        """The tokens kept, and the fused one."""
        return min(visual, share(visual, self.keep) + self.fuse)

    def reduce(self, tokens: Tokens, context: Context, step: int) -> Tokens:
        """Keep the tokens of most class attention; fuse or prune the others."""
        assert context.cls_attention is not None
        attention, alive = context.cls_attention[:, tokens.prefix :], tokens.visual_alive
        count = share_of(alive.sum(1, keepdim=True), self.keep)
        stays = reduction.highest(attention.masked_fill(~alive, -torch.inf), count)
        if self.fuse:
            return reduction.fuse(tokens, stays, attention)
        return reduction.prune(tokens, stays)
