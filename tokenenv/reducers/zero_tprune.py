"""Zero-TPrune: importance by a page rank of the attention graph, then likeness."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenenv.errors import UserError
from tokenenv.game.checks import check_keep
from tokenenv.reducers.base import Reducer, share_of
from tokenenv.vit import reduction
from tokenenv.vit.backbone import Backbone, Context
from tokenenv.vit.tokens import Tokens


@dataclass(frozen=True)
class ZeroTPrune(Reducer):
    """Zero-TPrune (Wang et al., CVPR 2024) in its main parts; no training.

    Importance: the attention of each head is a graph, and a token is important that important
    tokens heed: ``s <- A^T s``, from equal shares, some times (weighted page rank, section 3.2).
    The heads come together as the root of the mean square, which emphasises a region that only
    some heads see. Likeness (section 3.3): tokens of the less important half whose mean-head key
    is most like one of the more important half leave first; then the least important.

    Left out: the filter of heads by the variance of their importance, whose bounds the paper
    tunes per model, and the first ranking of its own for the partition; one ranking serves both.
    The number of rounds is the same in all blocks.

    Attributes:
        blocks: indices of the blocks where tokens go.
        keep: share of an image's living visual tokens that stays at each of them.
        alike: share of those leaving that leaves for likeness.
        rounds: of the page rank.
    """

    blocks: tuple[int, ...] = (3, 6, 9)
    keep: float = 0.7
    alike: float = 0.5
    rounds: int = 5
    reads: ClassVar[tuple[str, ...]] = ("matrix", "mean_keys")
    required: ClassVar[tuple[str, ...]] = ("keep",)
    usage: ClassVar[str] = (
        "zerotprune:keep=0.7[,blocks=3/6/9][,alike=0.5][,rounds=5]: page rank of the attention "
        "graph, then likeness (Zero-TPrune)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep)
        if not 0.0 <= self.alike <= 1.0:
            raise UserError(f"alike={self.alike:g} is no share: give 0 to 1")
        if self.rounds < 1:
            raise UserError(f"rounds={self.rounds} of the page rank: give 1 or more")

    def work(self, backbone: Backbone, block: int, tokens: Tensor) -> Tensor:
        """Multiply-adds of the page rank and of the cosines of all visual tokens."""
        heads = backbone.attention_dim(block) // backbone.head_dim(block)
        cosines = (tokens - backbone.prefix) ** 2 * backbone.head_dim(block)
        return self.rounds * heads * tokens**2 + cosines

    def reduce(self, tokens: Tokens, context: Context, step: int) -> Tokens:
        """Prune the like, then the unimportant."""
        assert context.attention is not None and context.mean_keys is not None
        alive = tokens.visual_alive
        count = alive.sum(1, keepdim=True)
        gone = count - share_of(count, self.keep)
        importance = self._importance(context.attention, tokens.alive)[:, tokens.prefix :]
        importance = importance.masked_fill(~alive, -torch.inf)
        important = reduction.highest(importance, (count + 1) // 2)
        unit = F.normalize(context.mean_keys[:, tokens.prefix :].float(), dim=-1)
        cosine = unit @ unit.transpose(1, 2)
        likeness = cosine.masked_fill(~important[:, None], -torch.inf).amax(2)
        likeness = likeness.masked_fill(important | ~alive, -torch.inf)
        alike = reduction.highest(likeness, torch.minimum((gone * self.alike).floor(), count // 2))
        others = importance.masked_fill(alike, -torch.inf)
        return reduction.prune(tokens, reduction.highest(others, count - gone))

    def _importance(self, attention: Tensor, alive: Tensor) -> Tensor:
        """``(B, heads, N, N)`` -> ``(B, N)``."""
        # Who is dead heeds nobody: it starts with nothing and is given nothing.
        score = (alive / alive.sum(1, keepdim=True))[:, None, None].expand(
            -1, attention.shape[1], -1, -1
        )
        for _ in range(self.rounds):
            score = score @ attention
        return score[:, :, 0].square().mean(1).sqrt()
