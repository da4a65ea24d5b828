"""Zero-TPrune: prunes by similarity and by PageRank importance on the attention graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenenv.errors import UserError
from tokenenv.game.checks import check_keep
from tokenenv.game.rules.features import cosines
from tokenenv.reducers.base import Reducer, share, share_of
from tokenenv.vit import reduction
from tokenenv.vit.backbone import Backbone, Context
from tokenenv.vit.tokens import Tokens


@dataclass(frozen=True)
class ZeroTPrune(Reducer):
    """Zero-TPrune (Wang et al., CVPR 2024), its main parts; without training.

    Importance (section 3.2): the attention of each head is a weighted graph, and a token is
    important if important tokens attend to it. From equal scores, ``s <- A^T s`` is iterated
    (weighted PageRank). The heads are combined by the root mean square, which emphasises tokens
    that are important in only some heads. Similarity (section 3.3): of the less important half,
    the tokens whose mean-head key is most similar to one of the more important half are pruned
    first; then the least important ones.

    Left out are the paper's filter of heads by the variance of their importance, whose bounds it
    tunes per model, and its separate ranking for the partition into halves: one ranking is used
    for both. The number of iterations is the same in all blocks.

    Attributes:
        blocks: indices of the blocks where tokens are pruned, strictly increasing.
        keep: share of an image's visual tokens that is kept in each of these blocks, in (0, 1].
        alike: share of the pruned tokens that is chosen by similarity, in [0, 1].
        rounds: iterations of the PageRank, at least 1.

    Raises:
        UserError: a value is out of range.
    """

    blocks: tuple[int, ...] = (3, 6, 9)
    keep: float = 0.7
    alike: float = 0.5
    rounds: int = 5
    reads: ClassVar[tuple[str, ...]] = ("matrix", "mean_keys")
    required: ClassVar[tuple[str, ...]] = ("keep",)
    traces = False
    usage: ClassVar[str] = (
        "zerotprune:keep=0.7[,blocks=3/6/9][,alike=0.5][,rounds=5]: prunes by similarity and by "
        "PageRank on the attention graph (Zero-TPrune)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep)
        if not 0.0 <= self.alike <= 1.0:
            raise UserError(f"alike={self.alike:g} is no share: give 0 to 1")
        if self.rounds < 1:
            raise UserError(f"rounds={self.rounds} of the page rank: give 1 or more")

    def work(self, backbone: Backbone, block: int, tokens: Tensor) -> Tensor:
        """Multiply-adds of the PageRank and of the cosines of all visual tokens."""
        heads = backbone.attention_dim(block) // backbone.head_dim(block)
        cosines = (tokens - backbone.prefix) ** 2 * backbone.head_dim(block)
        return self.rounds * heads * tokens**2 + cosines

    def left(self, backbone: Backbone, step: int, visual: int) -> int:
        """``ceil(keep visual)``."""
        return share(visual, self.keep)

    def reduce(self, tokens: Tokens, context: Context, step: int) -> Tokens:
        """Prune the most similar tokens, then the least important ones."""
        assert context.attention is not None and context.mean_keys is not None
        alive = tokens.visual_alive
        count = alive.sum(1, keepdim=True)
        gone = count - share_of(count, self.keep)
        importance = self._importance(context.attention, tokens.alive)[:, tokens.prefix :]
        importance = importance.masked_fill(~alive, -torch.inf)
        important = reduction.highest(importance, (count + 1) // 2)
        cosine = cosines(context.mean_keys[:, tokens.prefix :])
        likeness = cosine.masked_fill(~important[:, None], -torch.inf).amax(2)
        likeness = likeness.masked_fill(important | ~alive, -torch.inf)
        alike = reduction.highest(likeness, torch.minimum((gone * self.alike).floor(), count // 2))
        others = importance.masked_fill(alike, -torch.inf)
        return reduction.prune(tokens, reduction.highest(others, count - gone))

    def _importance(self, attention: Tensor, alive: Tensor) -> Tensor:
        """``(B, N)`` importance from the attention ``(B, heads, N, N)``; 0 for removed tokens."""
        # A removed token starts with score 0, and no token attends to it.
        score = (alive / alive.sum(1, keepdim=True))[:, None, None].expand(
            -1, attention.shape[1], -1, -1
        )
        for _ in range(self.rounds):
            score = score @ attention
        return score[:, :, 0].square().mean(1).sqrt()
