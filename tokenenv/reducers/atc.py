"""ATC: merges tokens by agglomerative clustering of their keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenenv.game.checks import check_keep
from tokenenv.game.rules.features import cosines
from tokenenv.reducers.base import Reducer, share, share_of
from tokenenv.vit import reduction
from tokenenv.vit.backbone import Backbone, Context
from tokenenv.vit.reduction import Match
from tokenenv.vit.tokens import Tokens


@dataclass(frozen=True)
class ATC(Reducer):
    """Agglomerative token clustering (Haurum et al., ECCV 2024, arXiv 2409.11923), untrained.

    Between attention and MLP every visual token starts as a cluster, and the two clusters of
    highest average linkage, the mean cosine of the mean-head keys over all pairs (section 3), are
    joined until ``ceil(keep n)`` are left. A cluster becomes the mean of its tokens weighted by
    size. Attention is proportional, as in ToMe. The paper also has single and complete linkage.

    Average linkage is reducible: clusters that are each other's nearest stay so until they are
    joined. All such pairs of a batch are joined at once, round by round, and of the whole
    dendrogram the joins of the highest linkage count. That gives the clusters of one join after
    another. After each round the host asks whether there is another, so the method can't be
    exported.

    Attributes:
        blocks: indices of the blocks where tokens are merged, strictly increasing.
        keep: share of an image's visual tokens that is left after each of these blocks, in (0, 1].

    Raises:
        UserError: a value is out of range.
    """

    blocks: tuple[int, ...] = (3, 6, 9)
    keep: float = 0.7
    reads: ClassVar[tuple[str, ...]] = ("mean_keys",)
    proportional: ClassVar[bool] = True
    required: ClassVar[tuple[str, ...]] = ("keep",)
    traces = False
    usage: ClassVar[str] = (
        "atc:keep=0.7[,blocks=3/6/9]: merges by agglomerative clustering of the keys (ATC)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep)

    def work(self, backbone: Backbone, block: int, tokens: Tensor) -> Tensor:
        """Multiply-adds of the cosines of all visual tokens."""
        return (tokens - backbone.prefix) ** 2 * backbone.head_dim(block)

    def left(self, backbone: Backbone, step: int, visual: int) -> int:
        """``ceil(keep visual)``."""
        return share(visual, self.keep)

    def reduce(self, tokens: Tokens, context: Context, step: int) -> Tokens:
        """Merge each cluster into its first token."""
        assert context.mean_keys is not None
        alive, prefix = tokens.visual_alive, tokens.prefix
        count = alive.sum(1, keepdim=True)
        linkage, into = dendrogram(cosines(context.mean_keys[:, prefix:]), alive)
        joined = reduction.highest(linkage, count - share_of(count, self.keep))
        place = torch.arange(alive.shape[1], device=alive.device).expand_as(alive)
        root = torch.where(joined & (linkage > -torch.inf), into, place)
        for _ in range(max(alive.shape[1] - 1, 1).bit_length()):
            root = root.gather(1, root)  # twice as far up the tree
        match = Match(place + prefix, root + prefix, torch.zeros_like(linkage))
        return reduction.merge(tokens, match, root != place)


def dendrogram(similarity: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    """The dendrogram of average linkage of each image's tokens.

    A cluster is named by its first token. Each token but one names, in the end, a cluster that was
    joined to one with an earlier name.

    Args:
        similarity: ``(B, V, V)``.
        alive: ``(B, V)`` bool, which tokens there are.

    Returns:
        ``(B, V)`` the linkage at which the cluster named so was joined to another, -inf if never;
        ``(B, V)`` the name of that other.
    """
    place = torch.arange(alive.shape[1], device=alive.device).expand_as(alive)
    linkage, into = torch.full(alive.shape, -torch.inf, device=alive.device), place
    size, total = alive.float(), similarity
    same = torch.eye(alive.shape[1], dtype=torch.bool, device=alive.device)
    while alive.shape[1]:
        total = (total + total.transpose(1, 2)) / 2  # rounding may differ between the two halves
        mean = total / (size[:, :, None] * size[:, None]).clamp(min=1)
        apart = same | (size[:, :, None] == 0) | (size[:, None] == 0)
        best, nearest = mean.masked_fill(apart, -torch.inf).max(2)
        mutual = (nearest.gather(1, nearest) == place) & (best > -torch.inf)
        joins = mutual & (nearest < place)
        if not bool(joins.any()):
            break
        linkage = torch.where(joins, best, linkage)
        into = torch.where(joins, nearest, into)
        target = torch.where(joins, nearest, place)
        total = torch.zeros_like(total).scatter_add(1, target[..., None].expand_as(total), total)
        total = torch.zeros_like(total).scatter_add(2, target[:, None].expand_as(total), total)
        size = torch.zeros_like(size).scatter_add(1, target, size)
    return linkage, into
