"""EViT: the tokens that the class token heeds stay, the others become one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tokenenv.game.checks import check_keep
from tokenenv.reducers.base import Reducer, share_of
from tokenenv.vit import reduction
from tokenenv.vit.backbone import Context
from tokenenv.vit.tokens import Tokens


@dataclass(frozen=True)
class EViT(Reducer):
    """EViT (Liang et al., ICLR 2022), without its fine-tuning.

    Between attention and MLP of blocks 3, 6 and 9 of 12 (the paper's layers 4, 7 and 10), the
    ``ceil(keep n)`` visual tokens with the most class attention, mean over the heads, stay. The
    others fuse into one token, their sum weighted by attention (both section 3). That token is one
    like all others at the next stage. The sum is divided by the sum of the weights here: a backbone
    that was not trained with it doesn't expect a token a tenth as long as the others.

    Attributes:
        blocks: indices of the blocks where tokens go.
        keep: share of an image's living visual tokens that stays at each of them.
        fuse: whether the others fuse; else they are dropped.
    """

    blocks: tuple[int, ...] = (3, 6, 9)
    keep: float = 0.7
    fuse: bool = True
    reads: ClassVar[tuple[str, ...]] = ("cls_attention",)
    required: ClassVar[tuple[str, ...]] = ("keep",)
    usage: ClassVar[str] = (
        "evit:keep=0.7[,blocks=3/6/9][,fuse=0]: top-k by class attention, the others fuse into one "
        "(EViT) or with fuse=0 are dropped"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep)

    def reduce(self, tokens: Tokens, context: Context, step: int) -> Tokens:
        """Keep the most heeded, fuse or drop the others."""
        assert context.cls_attention is not None
        attention, alive = context.cls_attention[:, tokens.prefix :], tokens.visual_alive
        count = share_of(alive.sum(1, keepdim=True), self.keep)
        stays = reduction.highest(attention.masked_fill(~alive, -torch.inf), count)
        if self.fuse:
            return reduction.fuse(tokens, stays, attention)
        return reduction.prune(tokens, stays)
