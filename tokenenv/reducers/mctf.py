"""MCTF: fuses tokens that are similar, uninformative and small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenenv.reducers.base import Reducer, check_numbers
from tokenenv.vit import packing, reduction
from tokenenv.vit.backbone import Backbone, Context
from tokenenv.vit.reduction import Match
from tokenenv.vit.tokens import Tokens

_INFORMATION, _SIZE = 1 / 20, 1 / 40
"""The paper's temperatures of these two criteria; that of similarity is 1."""


@dataclass(frozen=True)
class MCTF(Reducer):
    """Multi-criteria token fusion (Lee et al., CVPR 2024, arXiv 2403.10030), without training.

    Two tokens i and j attract each other by the product of three criteria (section 3.2):
    ``(cos(x_i, x_j) + 1) / 2``, ``(a_i a_j)^-1/20`` and ``(s_i s_j)^-1/40``, with a the attention
    that a token receives, mean over heads and queries, and s its size. The kept visual tokens are
    split alternately into two sets. Half of the r fusions go from the first set to the second, and
    then, with the fused tokens, half from the second to what is left of the first (bidirectional
    bipartite soft matching). A fused token is the mean weighted by a s; a fused token's a is the
    sum. Attention is proportional, as in ToMe.

    In the paper tokens are fused before attention, by the attention that the same block would have
    computed on all of them ("one step ahead", section 3.3), which it then reuses. Here they are
    fused after that attention, which has run on all tokens.

    Attributes:
        blocks: indices of the blocks where tokens are fused, strictly increasing.
        r: number of tokens removed in each of these blocks.

    Raises:
        UserError: a number is negative, or there is not one per block.
    """

    blocks: tuple[int, ...] = tuple(range(12))
    r: tuple[int, ...] = (8,) * 12
    reads: ClassVar[tuple[str, ...]] = ("matrix",)
    everywhere: ClassVar[bool] = True
    proportional: ClassVar[bool] = True
    required: ClassVar[tuple[str, ...]] = ("r",)
    traces = False
    usage: ClassVar[str] = (
        "mctf:r=8[,blocks=0/1/2]: merges by similarity, attention received and size (MCTF); "
        "r=8/6/4 block by block"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers("r", self.r, self.blocks, least=0)

    def work(self, backbone: Backbone, block: int, tokens: Tensor) -> Tensor:
        """Multiply-adds of the cosines between the two sets, in both directions."""
        visual = tokens - backbone.prefix
        first = (visual / 2).ceil()
        return 2 * first * (visual - first) * backbone.dim

    def left(self, backbone: Backbone, step: int, visual: int) -> int:
        """``visual`` less the tokens fused."""
        first = min(-(-self.r[step] // 2), (visual + 1) // 2) if visual > 1 else 0
        takers = (visual + 1) // 2 - first
        return visual - first - (min(self.r[step] // 2, visual // 2) if takers else 0)

    def reduce(self, tokens: Tokens, context: Context, step: int) -> Tokens:
        """Fuse from the first set to the second, then back."""
        assert context.attention is not None
        asking = tokens.alive / tokens.alive.sum(1, keepdim=True)
        received = (context.attention.mean(1) * asking[..., None]).sum(1)
        # The sets alternate over the kept tokens, wherever the removed ones are.
        place = packing.kept_first(tokens)[:, tokens.prefix :]
        one, other = place[:, ::2], place[:, 1::2]
        half = self.r[step] // 2
        tokens, received = _fuse(tokens, received, one, other, self.r[step] - half)
        return _fuse(tokens, received, other, one, half)[0]


def _fuse(
    tokens: Tokens, received: Tensor, givers: Tensor, takers: Tensor, count: int
) -> tuple[Tokens, Tensor]:
    """Fuse the ``count`` givers that are attracted most into the takers that attract them.

    Args:
        tokens: ``(B, N)`` tokens, not packed.
        received: ``(B, N)`` attention that each receives.
        givers: ``(B, A)`` indices into ``N``.
        takers: ``(B, C)`` indices into ``N``, none of them a giver.
        count: number of givers.

    Returns:
        The tokens, where they were, and the attention that each receives now.
    """
    x = reduction.normalised(tokens.x)
    cosine = packing.take(x, givers) @ packing.take(x, takers).transpose(1, 2)
    lonely = received.clamp(min=1e-12) ** -_INFORMATION * tokens.size.clamp(min=1) ** -_SIZE
    attraction = (cosine + 1) / 2 * lonely.gather(1, givers)[..., None]
    attraction = attraction * lonely.gather(1, takers)[:, None]
    gone = ~tokens.alive
    apart = gone.gather(1, givers)[..., None] | gone.gather(1, takers)[:, None]
    # One more taker, as an image with a single visual token has none.
    best, choice = F.pad(attraction.masked_fill(apart, -torch.inf), (0, 1), value=-torch.inf).max(2)
    chosen = reduction.highest(best, count) & (best > -torch.inf)
    partner = F.pad(takers, (0, 1)).gather(1, choice)
    given = torch.where(chosen, received.gather(1, givers), 0.0)
    match = Match(givers, partner, best)
    fused = reduction.merge(tokens, match, chosen, received * tokens.size)
    return fused, received.scatter_add(1, partner, given)
