"""Representation shift: prunes the tokens that an MLP changes least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tokenenv.errors import UserError
from tokenenv.game.checks import check_keep
from tokenenv.reducers.base import Reducer, share, share_of
from tokenenv.vit import reduction
from tokenenv.vit.backbone import Backbone, Context
from tokenenv.vit.tokens import Tokens


@dataclass(frozen=True)
class RepresentationShift(Reducer):
    """Pruning by representation shift (Choi et al., ICCV 2025, arXiv 2508.00367), untrained.

    Before a block, the ``ceil(keep n)`` visual tokens are kept that the MLP of the block before
    moved farthest, by the Euclidean distance of a token after it from the token before it (section
    3). No attention is read.

    Attributes:
        blocks: indices of the blocks before which tokens are pruned, from 1, strictly increasing.
        keep: share of an image's visual tokens that is kept before each of these blocks, in (0, 1].

    Raises:
        UserError: a value is out of range.
    """

    blocks: tuple[int, ...] = (3, 6, 9)
    keep: float = 0.7
    between: ClassVar[bool] = False
    required: ClassVar[tuple[str, ...]] = ("keep",)
    traces = False
    usage: ClassVar[str] = (
        "shift:keep=0.7[,blocks=3/6/9]: keeps the tokens that the MLP before changed most "
        "(representation shift)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep)
        if self.blocks[0] < 1:
            raise UserError("blocks=0: no MLP runs before block 0: give blocks from 1")

    def wants(self, block: int) -> dict[str, bool]:
        """The tokens before the MLP of the block before a decision."""
        return {"embeddings": block + 1 in self.blocks}

    def left(self, backbone: Backbone, step: int, visual: int) -> int:
        """``ceil(keep visual)``."""
        return share(visual, self.keep)

    def reduce(self, tokens: Tokens, context: Context, step: int) -> Tokens:
        """Keep the tokens that moved farthest."""
        assert context.embeddings is not None
        moved = tokens.x - context.embeddings
        distance = torch.linalg.vector_norm(moved, dim=2, dtype=torch.float32)[:, tokens.prefix :]
        alive = tokens.visual_alive
        count = share_of(alive.sum(1, keepdim=True), self.keep)
        farthest = reduction.highest(distance.masked_fill(~alive, -torch.inf), count)
        return reduction.prune(tokens, farthest)
