"""DiffRate: prunes the tokens of least class attention and merges the next ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenenv.reducers.base import Reducer, check_numbers
from tokenenv.vit import packing, reduction
from tokenenv.vit.backbone import Backbone, Context
from tokenenv.vit.reduction import Match
from tokenenv.vit.tokens import Tokens


@dataclass(frozen=True)
class DiffRate(Reducer):
    """DiffRate (Chen et al., ICCV 2023) with given rates.

    ``tokenenv tune`` and ``examples/diffrate_search.py`` find rates for a model.

    The visual tokens of a block are sorted by class attention, mean over the heads. The last
    ``prune`` of them are pruned. Of the rest, the last ``merge`` are each merged into the most
    similar of those before them, by the cosine of the embeddings, as a mean weighted by size
    (Figure 3a). Attention is proportional, as in ToMe. One visual token is always kept. The
    published code takes plain means, with merged tokens weighted by size times cosine.

    Attributes:
        blocks: indices of the blocks where tokens are removed, strictly increasing.
        prune: number of tokens pruned in each of these blocks.
        merge: number of tokens merged in each of these blocks.

    Raises:
        UserError: a number is negative, or there is not one per block.
    """

    blocks: tuple[int, ...] = tuple(range(12))
    prune: tuple[int, ...] = (4,) * 12
    merge: tuple[int, ...] = (4,) * 12
    reads: ClassVar[tuple[str, ...]] = ("cls_attention",)
    everywhere: ClassVar[bool] = True
    proportional: ClassVar[bool] = True
    required: ClassVar[tuple[str, ...]] = ("prune", "merge")
    traces = False
    usage: ClassVar[str] = (
        "diffrate:prune=4,merge=4[,blocks=0/1/2]: prunes the tokens of least class attention, "
        "merges the next (DiffRate); prune=6/4/2 block by block"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers("prune", self.prune, self.blocks, least=0)
        check_numbers("merge", self.merge, self.blocks, least=0)

    def work(self, backbone: Backbone, block: int, tokens: Tensor) -> Tensor:
        """Multiply-adds of the cosines between merged and kept tokens."""
        step = self.blocks.index(block)
        rest = (tokens - backbone.prefix - self.prune[step]).clamp(min=1)
        merging = (rest - 1).clamp(max=self.merge[step])
        return merging * (rest - merging) * backbone.dim

    def left(self, backbone: Backbone, step: int, visual: int) -> int:
        """``visual`` less those pruned and merged, at least 1."""
        return max(max(visual - self.prune[step], 1) - self.merge[step], 1)

    def reduce(self, tokens: Tokens, context: Context, step: int) -> Tokens:
        """Prune, then merge."""
        assert context.cls_attention is not None
        alive = tokens.visual_alive
        attention = context.cls_attention[:, tokens.prefix :].masked_fill(~alive, -torch.inf)
        order = torch.sort(attention, dim=1, descending=True, stable=True).indices
        rest = (alive.sum(1, keepdim=True) - self.prune[step]).clamp(min=1)
        left = (rest - self.merge[step]).clamp(min=1)
        if self.prune[step]:
            tokens = reduction.prune(tokens, packing.inverse(order) < rest)
        # The numbers of merged and kept tokens for an image with all its tokens; upper bounds.
        most = max(alive.shape[1] - self.prune[step], 1)
        merging = min(self.merge[step], most - 1)
        if not self.merge[step]:
            return tokens
        device = order.device
        place = left + torch.arange(merging, device=device)
        givers = order.gather(1, place.clamp(max=order.shape[1] - 1))
        takers = order[:, : most - merging]
        visual = reduction.normalised(tokens.visual)
        one, other = packing.take(visual, givers), packing.take(visual, takers)
        staying = torch.arange(takers.shape[1], device=device) < left
        cosine = (one @ other.transpose(1, 2)).masked_fill(~staying[:, None], -torch.inf)
        score, best = cosine.max(2)
        match = Match(givers + tokens.prefix, takers.gather(1, best) + tokens.prefix, score)
        return reduction.merge(tokens, match, place < rest)
