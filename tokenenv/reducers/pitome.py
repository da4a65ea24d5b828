"""PiToMe: merges tokens that are similar to many others and protects the distinctive ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenenv.errors import UserError
from tokenenv.game.rules.features import cosines
from tokenenv.reducers.base import Reducer, share, share_of
from tokenenv.vit import reduction
from tokenenv.vit.backbone import Backbone, Context
from tokenenv.vit.reduction import Match
from tokenenv.vit.tokens import Tokens

LEAST = 0.5
"""Smallest share to keep: at most half of the tokens can be merged into the other half."""


@dataclass(frozen=True)
class PiToMe(Reducer):
    """PiToMe (Tran et al., NeurIPS 2024), without training.

    Of ``n`` visual tokens, ``k = n - ceil(keep n)`` are merged into others. Every token has an
    energy, the mean over the other tokens of ``f(c - m)``: c is the cosine of the mean-head keys, m
    the paper's margin ``0.9 - 0.9 l / L`` in block l of L, and f an ELU, x for x >= 0 and
    ``alpha (exp(x) - 1)`` below (section 3.2; the paper's f is c itself above the margin and so
    jumps there, which loses more accuracy on DeiT-Tiny). The 2 k tokens of the highest energy are
    candidates, the others are protected. In the order of energy every second candidate is merged
    into the most similar of the other k, as a mean weighted by size. Attention is proportional, as
    in ToMe.

    The energy is that of the published code, the choice of candidates that of the paper in every
    block. In half of the blocks (which half differs between its versions, as the margin does) the
    code protects no token: in the order of energy it pairs every second of all tokens with the
    others, and merges the k most similar pairs.

    Attributes:
        blocks: indices of the blocks where tokens are merged, strictly increasing.
        keep: share of an image's visual tokens that is left after each of these blocks, in
            [0.5, 1].
        depth: number of blocks L of the model.
        alpha: f is bounded below by -alpha, its limit for dissimilar tokens; positive.

    Raises:
        UserError: a value is out of range.
    """

    blocks: tuple[int, ...] = tuple(range(12))
    keep: float = 0.9
    depth: int = 12
    alpha: float = 1.0
    reads: ClassVar[tuple[str, ...]] = ("mean_keys",)
    everywhere: ClassVar[bool] = True
    proportional: ClassVar[bool] = True
    required: ClassVar[tuple[str, ...]] = ("keep",)
    traces = False
    usage: ClassVar[str] = (
        "pitome:keep=0.9[,blocks=0/1/2][,alpha=1]: merges tokens similar to many others (PiToMe)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not LEAST <= self.keep <= 1.0:
            raise UserError(
                f"keep={self.keep:g}: half of the tokens merge at most, give {LEAST} to 1"
            )
        if not 0.0 < self.alpha < math.inf:
            raise UserError(f"alpha={self.alpha:g} must be above 0, and finite")

    def check(self, backbone: Backbone) -> None:
        """Raise :class:`UserError` if the reducer doesn't fit the backbone."""
        super().check(backbone)
        if self.depth != backbone.depth:
            raise UserError(
                f"depth={self.depth}, over which the margin falls, and the model has "
                f"{backbone.depth} blocks: give depth={backbone.depth}"
            )

    def work(self, backbone: Backbone, block: int, tokens: Tensor) -> Tensor:
        """Multiply-adds of the cosines of all visual tokens."""
        return (tokens - backbone.prefix) ** 2 * backbone.head_dim(block)

    def margin(self, step: int) -> float:
        """The margin m in block ``blocks[step]``."""
        return 0.9 - 0.9 * self.blocks[step] / self.depth

    def left(self, backbone: Backbone, step: int, visual: int) -> int:
        """``ceil(keep visual)``."""
        return share(visual, self.keep)

    def reduce(self, tokens: Tokens, context: Context, step: int) -> Tokens:
        """Merge tokens of the highest energy."""
        assert context.mean_keys is not None
        alive = tokens.visual_alive
        cosine = cosines(context.mean_keys[:, tokens.prefix :])
        energy = self._energy(cosine, alive, self.margin(step)).masked_fill(~alive, -torch.inf)
        order = torch.sort(energy, dim=1, descending=True, stable=True).indices
        count = alive.sum(1, keepdim=True)
        merging = count - share_of(count, self.keep)
        # The number of pairs of an image with all its tokens; an upper bound. While torch exports
        # the method it knows no number of tokens: half of them is a bound, too, and may be 0.
        n = alive.shape[1]
        exported = isinstance(n, torch.SymInt)
        pairs = n // 2 if exported else n - share(n, self.keep)
        if self.keep == 1.0 or not (exported or pairs):
            return tokens
        givers, takers = order[:, : 2 * pairs : 2], order[:, 1 : 2 * pairs : 2]
        between = cosine.gather(1, givers[..., None].expand(-1, -1, alive.shape[1]))
        between = between.gather(2, takers[:, None].expand(-1, pairs, -1))
        taking = torch.arange(pairs, device=order.device) < merging
        between = between.masked_fill(~taking[:, None], -torch.inf)
        if exported:
            between = F.pad(between, (0, 1), value=-torch.inf)
            takers = F.pad(takers, (0, 1))
        score, best = between.max(2)
        match = Match(givers + tokens.prefix, takers.gather(1, best) + tokens.prefix, score)
        return reduction.merge(tokens, match, taking)

    def _energy(self, cosine: Tensor, alive: Tensor, margin: float) -> Tensor:
        """``(B, n)`` energies from the cosines ``(B, n, n)``.

        A token's cosine with itself is included: it is 1 for all and does not change their order.
        """
        each = F.elu(cosine - margin, self.alpha) * alive[:, None]
        return each.sum(2) / alive.sum(1, keepdim=True).clamp(min=1)
