"""MSTM's merging: important tokens are kept, each other one is merged into the most similar."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokenenv.errors import UserError, check_choice
from tokenenv.game.checks import check_keep
from tokenenv.game.rules.features import cosines
from tokenenv.reducers.base import Reducer, share, share_of
from tokenenv.vit import reduction
from tokenenv.vit.backbone import Backbone, Context
from tokenenv.vit.tokens import Tokens

Weight = Literal["importance", "mean", "size", "soft"]
Similarity = Literal["keys", "tokens"]
_TEMPERATURE = 0.1


@dataclass(frozen=True)
class MSTM(Reducer):
    """Bian et al., arXiv 2306.04897, "Multi-Scale And Token Mergence"; between attention and MLP.

    The paper splits tokens by an importance score into crucial and non-crucial ones and merges the
    latter into the former by similarity. Its formulas are not public; these are ours. Of an image's
    ``n`` visual tokens the ``ceil(keep n)`` with the highest attention of the class token (mean
    over heads) are crucial. Each other token ``j`` is merged into the crucial token ``c`` of the
    highest cosine: ``x_c <- (w_c x_c + sum_j w_j x_j) / (w_c + sum_j w_j)``. If all were merged
    into one token, that would be EViT's fused token. Keeping 70 % in three blocks fits the cost
    that the paper reports.

    Attributes:
        keep: share of the visual tokens that is crucial, in (0, 1].
        weight: the weights ``w``. ``importance``: the class token's attention. ``mean``: 1.
            ``size``: the number of patches that a token stands for. ``soft``: importance, and each
            token is divided among all crucial ones by softmax(cosine / 0.1); its patches go to the
            most similar.
        similarity: whether to take the cosine of ``keys`` (mean over heads) or of ``tokens``.
        least: smallest cosine at which a token is merged; less similar tokens are pruned.

    Raises:
        UserError: a value is unknown or out of range.
    """

    keep: float = 0.7
    weight: Weight = "importance"
    similarity: Similarity = "keys"
    least: float = -1.0
    reads: ClassVar[tuple[str, ...]] = ("cls_attention", "mean_keys")
    required: ClassVar[tuple[str, ...]] = ("keep",)
    traces = False
    usage: ClassVar[str] = (
        "mstm:keep=0.7[,blocks=3/6/9][,weight=importance|mean|size|soft]"
        "[,similarity=keys|tokens][,least=-1]: merges the others into the most similar (MSTM)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep)
        check_choice("weight", self.weight, Weight)
        check_choice("similarity", self.similarity, Similarity)
        if not -1.0 <= self.least <= 1.0:
            raise UserError(f"least={self.least:g} is no cosine: give -1 to 1")

    def wants(self, block: int) -> dict[str, bool]:
        """The class token's attention, and mean keys if ``similarity`` needs them."""
        wanted = super().wants(block)
        return wanted | {"mean_keys": wanted["mean_keys"] and self.similarity == "keys"}

    def work(self, backbone: Backbone, block: int, tokens: Tensor) -> Tensor:
        """Multiply-adds of the similarities and the means."""
        visual = tokens - backbone.prefix
        pairs = visual * visual  # all pairs, as each image has other crucial tokens
        width = backbone.head_dim(block) if self.similarity == "keys" else backbone.dim
        moves = pairs if self.weight == "soft" else visual - share_of(visual, self.keep)
        return pairs * width + moves * backbone.dim

    def left(self, backbone: Backbone, step: int, visual: int) -> int:
        """The crucial tokens."""
        return share(visual, self.keep)

    def reduce(self, tokens: Tokens, context: Context, step: int) -> Tokens:
        """Choose the crucial tokens and merge the others into them."""
        assert context.cls_attention is not None
        prefix, alive = tokens.prefix, tokens.visual_alive
        importance = context.cls_attention[:, prefix:]
        count = share_of(alive.sum(1, keepdim=True), self.keep)
        crucial = reduction.highest(importance.masked_fill(~alive, -torch.inf), count) & alive
        cosine = self._cosine(tokens, context).masked_fill(~crucial[:, None], -torch.inf)
        best, nearest = cosine.max(dim=2)
        goes = alive & ~crucial
        if self.weight == "soft":
            tokens = tokens.with_x(self._shared_out(tokens, importance, cosine, goes))
        weight = {
            "importance": context.cls_attention,
            "mean": torch.ones_like(context.cls_attention),
            "size": tokens.size,
            # What a token gives has arrived already: only its patches move.
            "soft": torch.zeros_like(context.cls_attention),
        }[self.weight]
        place = torch.arange(alive.shape[1], device=alive.device).expand_as(alive) + prefix
        match = reduction.Match(place, nearest + prefix, best)
        merged = reduction.merge(tokens, match, goes & self._enough(best), weight)
        return merged if self.least == -1.0 else reduction.prune(merged, crucial)

    def _cosine(self, tokens: Tokens, context: Context) -> Tensor:
        """``(B, V, V)`` cosines between all visual tokens."""
        if self.similarity == "tokens":
            return cosines(tokens.visual)
        assert context.mean_keys is not None
        return cosines(context.mean_keys[:, tokens.prefix :])

    def _enough(self, cosine: Tensor) -> Tensor:
        """Whether a cosine is high enough to merge; rounding may put -1 slightly below -1."""
        return cosine.clamp(min=-1.0) >= self.least

    def _shared_out(
        self, tokens: Tokens, importance: Tensor, cosine: Tensor, goes: Tensor
    ) -> Tensor:
        """``(B, N, D)`` embeddings after dividing removed tokens among all crucial ones."""
        goes = goes & self._enough(cosine.amax(2))
        share = (cosine / _TEMPERATURE).softmax(2) * (importance * goes)[..., None]
        total = importance + share.sum(1)
        visual = tokens.visual.float()
        # (w x + sum s x') / (w + sum s) as a step from x: exact for a token that receives nothing.
        step = share.transpose(1, 2) @ visual - share.sum(1)[..., None] * visual
        moved = visual + step / total.clamp(min=1e-12)[..., None]
        return torch.cat([tokens.x[:, : tokens.prefix], moved.to(tokens.x.dtype)], dim=1)
