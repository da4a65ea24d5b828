"""ToFu: prunes the most redundant tokens in early blocks, merges them in late ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenenv.errors import UserError
from tokenenv.reducers.base import Reducer, check_numbers
from tokenenv.vit import reduction
from tokenenv.vit.backbone import Backbone, Context
from tokenenv.vit.reduction import Match
from tokenenv.vit.tokens import Tokens


@dataclass(frozen=True)
class ToFu(Reducer):
    """Token Fusion (Kim et al., WACV 2024, arXiv 2312.01026), without training.

    ToMe's bipartite matching on the mean-head keys proposes the r most similar pairs in every
    block. Where the model is least linear in its tokens, in early blocks (section 3.1), the
    candidates are pruned; later they are merged into their partners by MLERP (section 3.2): the
    mean of all, weighted by size, rescaled to the largest of their norms. Attention is
    proportional, as in ToMe. The paper chooses per model from which block on to merge; here it is
    half of the blocks unless given.

    Attributes:
        blocks: indices of the blocks where tokens are removed, strictly increasing.
        r: number of pairs in each of these blocks.
        merge_from: index of the first block that merges; -1: half of ``depth``.
        depth: number of blocks of the model.

    Raises:
        UserError: a value is out of range, or there is not one ``r`` per block.
    """

    blocks: tuple[int, ...] = tuple(range(12))
    r: tuple[int, ...] = (8,) * 12
    merge_from: int = -1
    depth: int = 12
    reads: ClassVar[tuple[str, ...]] = ("mean_keys",)
    everywhere: ClassVar[bool] = True
    proportional: ClassVar[bool] = True
    required: ClassVar[tuple[str, ...]] = ("r",)
    traces = False
    usage: ClassVar[str] = (
        "tofu:r=8[,blocks=0/1/2][,merge_from=6]: prunes the 8 most similar tokens in early blocks, "
        "merges them later (ToFu); r=8/6/4 block by block"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers("r", self.r, self.blocks, least=0)
        if self.merge_from < -1:
            raise UserError(f"merge_from={self.merge_from}: give the index of a block")

    def check(self, backbone: Backbone) -> None:
        """Raise :class:`UserError` if the reducer doesn't fit the backbone."""
        super().check(backbone)
        if self.merge_from < 0 and self.depth != backbone.depth:
            raise UserError(
                f"depth={self.depth}, from half of which on tokens merge, and the model has "
                f"{backbone.depth} blocks: give depth={backbone.depth}"
            )

    def work(self, backbone: Backbone, block: int, tokens: Tensor) -> Tensor:
        """Multiply-adds of the matching."""
        visual = tokens - backbone.prefix
        pairs = (visual / 2).ceil()
        return pairs * (visual - pairs) * backbone.head_dim(block)

    def left(self, backbone: Backbone, step: int, visual: int) -> int:
        """``visual`` less the pairs."""
        return visual - (min(self.r[step], (visual + 1) // 2) if visual > 1 else 0)

    def reduce(self, tokens: Tokens, context: Context, step: int) -> Tokens:
        """Prune or merge the most similar candidates."""
        assert context.mean_keys is not None
        match = reduction.bipartite_match(tokens, context.mean_keys)
        chosen = reduction.strongest(match, self.r[step]) & (match.score > -torch.inf)
        first = self.depth // 2 if self.merge_from < 0 else self.merge_from
        if self.blocks[step] >= first:
            return mlerp(tokens, match, chosen)
        gone = torch.zeros_like(tokens.alive).scatter(1, match.token, chosen)
        return reduction.prune(tokens, ~gone[:, tokens.prefix :])


def mlerp(tokens: Tokens, match: Match, accept: Tensor) -> Tokens:
    """:func:`~tokenenv.vit.reduction.merge`, then rescale what was merged to the largest norm.

    Args:
        tokens: ``(B, N)`` tokens, not packed.
        match: candidate pairs, ``(B, A)`` each.
        accept: ``(B, A)`` bool, which pairs to merge.
    """
    merged = reduction.merge(tokens, match, accept)
    norm = torch.linalg.vector_norm(tokens.x, dim=2, dtype=torch.float32)
    given = torch.where(accept, norm.gather(1, match.token), 0.0)
    largest = norm.scatter_reduce(1, match.partner, given, "amax")
    now = torch.linalg.vector_norm(merged.x, dim=2, dtype=torch.float32).clamp(min=1e-12)
    scale = torch.where(merged.size > tokens.size, largest / now, 1.0)
    return merged.with_x(merged.x * scale[..., None].to(merged.x.dtype))
