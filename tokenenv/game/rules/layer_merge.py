"""DORA, merging: one agent per block chooses which candidate pairs of a matching are merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenenv.errors import UserError, check_choice
from tokenenv.game.checks import check_blocks, check_features, check_range
from tokenenv.game.reduction import Moment
from tokenenv.game.rules import layer
from tokenenv.game.rules.base import Rules
from tokenenv.game.rules.features import log_relative, whole_numbers
from tokenenv.game.rules.observation import Observation
from tokenenv.vit import packing, reduction
from tokenenv.vit.backbone import Backbone, Context
from tokenenv.vit.reduction import Match
from tokenenv.vit.tokens import Tokens

MERGE = 1
FEATURES = ("similarity", "cls_attention", "size", "token", "keys")
Action = Literal["pairs", "count"]


@dataclass(frozen=True)
class LayerMerge(Rules):
    """Merge or keep, between attention and MLP of every block (DORA, He et al., arXiv 2605.11683).

    ToMe's bipartite matching on the mean-head keys proposes candidate pairs: every second visual
    token and its most similar partner among the others. The block's agent accepts or refuses each;
    an accepted pair is replaced by its size-weighted mean. Prefix tokens are never merged.

    The paper's text is not public beyond its abstract ("binary merge actions", decided per block);
    the rest is our reading.

    Attributes:
        blocks: indices of the decision blocks, strictly increasing.
        action: ``pairs``: merge (1) or keep (0) for every candidate pair, ``A = ceil(P / 2)`` of
            them at the start. ``count``: one number per block, an index into ``grid``.
        grid: how many pairs each choice of ``count`` merges, the most similar first; increasing
            from 0.
        features: features of a candidate and its partner (``pairs``), widths in parentheses.
            ``similarity``: their cosine, and how much it exceeds the candidates' mean, both as
            :func:`scaled` (2). ``cls_attention``: log of the class token's attention to each,
            relative to the mean over all tokens left (2). ``size``: log of the number of patches
            each stands for (2). ``token``: cosine of their embeddings, as :func:`scaled`, and log
            ratio of the embeddings' norms (2). ``keys``: the mean-head keys of both (2 x head
            width).
        proportional: whether a merged token counts in attention as all its patches (ToMe's
            proportional attention).
        share: whether the agent also observes which decision it is, and the history.
        shuffle: whether tokens are split and ordered as in ToMe's published code. There, the
            split into A and B counts from the first prefix token, and the remaining tokens of A
            are moved before those of B, so the next block splits tokens that were not adjacent.
            Otherwise the split counts from the first visual token, and tokens stay in the order of
            their patches.
    """

    blocks: tuple[int, ...] = tuple(range(12))
    action: Action = "pairs"
    grid: tuple[int, ...] = (0, 2, 4, 8, 12, 16, 24, 32)
    features: tuple[str, ...] = ("similarity", "cls_attention", "size", "token")
    proportional: bool = True
    share: bool = True
    shuffle: bool = False
    packed = True
    traces = False
    merges: ClassVar[bool] = True
    choices: ClassVar[tuple[str, str]] = ("keep", "merge")
    face_defaults: ClassVar[dict[str, Any]] = {"action": "count"}

    def __post_init__(self) -> None:
        check_blocks(self.blocks)
        check_features(self.features, FEATURES)
        check_choice("action", self.action, Action)
        if len(self.grid) < 2 or self.grid[0] != 0 or list(self.grid) != sorted(set(self.grid)):
            raise UserError(f"grid={self.grid} must increase from 0, such as (0, 4, 8, 16)")

    @property
    def reorders(self) -> bool:  # type: ignore[override]
        """Whether tokens are ordered anew after every decision."""
        return self.shuffle

    @property
    def by_count(self) -> bool:
        """Whether the action is a count."""
        return self.action == "count"

    @classmethod
    def decision_blocks(cls, depth: int, max_cycles: int | None) -> tuple[int, ...]:
        """All blocks, or ``max_cycles`` spread evenly with the last one included."""
        return layer.decision_blocks(depth, max_cycles)

    def check(self, backbone: Backbone) -> None:
        """Raise :class:`UserError` if these rules don't fit the backbone."""
        check_range(self.blocks, backbone.depth)
        pairs = backbone.patches // 2
        if not pairs:
            raise UserError(f"the model has {backbone.patches} visual tokens: no two could merge")
        if self.action == "count" and self.grid[-1] > pairs:
            raise UserError(
                f"grid={self.grid} asks for {self.grid[-1]} pairs and {backbone.patches} visual "
                f"tokens make {pairs}: give a grid up to {pairs}"
            )
        if "cls_attention" in self._observed and not backbone.has_class_token:
            raise UserError(
                "feature 'cls_attention' needs a class token and this model has none: leave it out"
            )

    @property
    def _observed(self) -> tuple[str, ...]:
        return self.features if self.action == "pairs" else ("similarity",)

    def actions(self, backbone: Backbone) -> int:
        """2, keep and merge; or, with ``count``, the number of choices in ``grid``."""
        return 2 if self.action == "pairs" else len(self.grid)

    def agents(self, backbone: Backbone) -> int:
        """Number of candidate pairs before anything is merged; 1 with ``count``."""
        pairs = self.candidates(backbone.patches, backbone.prefix)
        return pairs if self.action == "pairs" else 1

    def candidates(self, visual: int, prefix: int) -> int:
        """Number of candidates among ``visual`` tokens after ``prefix`` others."""
        return (visual + 1 - self._first(prefix)) // 2

    def deciders(self, visual: Tensor) -> Tensor:
        """One per candidate pair; 1 with ``count``."""
        return (visual / 2).ceil() if self.action == "pairs" else torch.ones_like(visual)

    def wants(self, block: int) -> dict[str, bool]:
        """What the attention of ``block`` must return: arguments of ``Backbone.attend``."""
        due = block in self.blocks
        return {
            "mean_keys": due,
            "cls_attention": due and "cls_attention" in self._observed,
            "proportional": self.proportional,
        }

    def macs(self, backbone: Backbone, block: int, tokens: Tensor) -> Tensor:
        """Multiply-adds of matching and observing ``tokens`` (float, prefix included)."""
        visual = tokens - backbone.prefix
        pairs = (visual / 2).ceil()
        total = pairs * (visual - pairs) * backbone.head_dim(block)
        if "cls_attention" in self._observed:
            total = total + tokens * backbone.attention_dim(block)
        if "token" in self._observed:
            total = total + pairs * 3 * backbone.dim
        return total

    def prepare(self, tokens: Tokens, context: Context) -> Match:
        """ToMe's candidate pairs by the mean-head keys."""
        assert context.mean_keys is not None
        return reduction.bipartite_match(tokens, context.mean_keys, self._first(tokens.prefix))

    def _first(self, prefix: int) -> int:
        """Index, 0 or 1, of the first visual token that is a candidate."""
        return prefix % 2 if self.shuffle else 0

    def layout(self, backbone: Backbone) -> dict[str, slice]:
        """The slice of each named feature in an agent's own features."""
        if self.action == "count":
            return {"similarity": slice(0, len(self.grid))}
        layout, start = {}, 0
        for name in self.features:
            width = 2 * max(map(backbone.head_dim, self.blocks)) if name == "keys" else 2
            layout[name] = slice(start, start + width)
            start += width
        return layout

    def shared_dim(self, backbone: Backbone) -> int:
        """Width of the one-hot decision and the history; 0 without ``share``."""
        return len(self.blocks) + layer.HISTORY_DIM if self.share else 0

    def state_dim(self, backbone: Backbone) -> int:
        """Width of :func:`tokenenv.game.rules.layer.state`."""
        return layer.state_dim(backbone, len(self.blocks))

    def to_roster(self, backbone: Backbone, tokens: Tokens, values: Tensor) -> Tensor:
        """Candidate ``i`` has agent ``i``: ``(B, a, ...)`` -> ``(B, A, ...)``, padded by zeros."""
        missing = self.agents(backbone) - values.shape[1]
        if not missing:
            return values
        return torch.cat([values, values.new_zeros(len(values), missing, *values.shape[2:])], 1)

    def from_roster(self, tokens: Tokens, values: Tensor) -> Tensor:
        """``(B, A, ...)`` -> ``(B, a, ...)`` without the agents that have no candidate now."""
        if self.action == "count":
            return values
        return values[:, : self.candidates(tokens.alive.shape[1] - tokens.prefix, tokens.prefix)]

    def observe(self, backbone: Backbone, moment: Moment, *, state: bool = False) -> Observation:
        """What the agent sees: a row per candidate as they lie, or a single one (``count``)."""
        match = moment.match
        assert match is not None
        possible = match.score > -torch.inf
        score = torch.where(possible, match.score, 0.0)
        legal = None
        if self.action == "pairs":
            active, own = possible, self._candidates(moment, match, score, possible)
        else:
            active = possible.any(1, keepdim=True)
            own = _curve(match.score, self.grid)[:, None]
            grid = whole_numbers(self.grid, score.device)
            legal = (grid <= possible.sum(1, keepdim=True))[:, None]
        steps = len(self.blocks)
        shared = own.new_zeros(own.shape[0], 0)
        if self.share:
            shared = torch.cat([layer.one_hot_step(moment, steps), layer.history(moment)], 1)
        return Observation(
            agents=own * active[..., None] if moment.tokens.ragged or legal is not None else own,
            shared=shared,
            active=active,
            step=moment.step,
            layout=self.layout(backbone),
            legal=legal,
            state=layer.state(backbone, moment, steps) if state else None,
        )

    def _candidates(self, moment: Moment, match: Match, score: Tensor, possible: Tensor) -> Tensor:
        """``(B, A, F)`` the features of every candidate."""
        known = self._of_tokens(moment, match)
        own: list[Tensor] = []
        for name in self.features:
            if name == "similarity":
                number: Tensor | int = max(score.shape[1], 1)
                if moment.tokens.ragged:
                    number = possible.sum(1, keepdim=True).clamp(min=1)
                mean = score.sum(1, keepdim=True) / number
                own += [scaled(score), scaled(score - mean + _USUAL)]
            elif name == "token":
                one, other = known["length"].unbind(1)
                cosine = _product(moment.tokens, match) / (one * other)
                own += [scaled(cosine), (one / other).log_()]
            elif name == "keys":
                assert moment.context.mean_keys is not None
                key = moment.context.mean_keys.float()
                own += [packing.take(key, index) for index in match[:2]]
            else:
                own += known[name].unbind(1)
        if "keys" not in self.features:
            return torch.stack(own, 2)  # all of width 1
        return torch.cat([each if each.dim() == 3 else each[..., None] for each in own], 2)

    def _of_tokens(self, moment: Moment, match: Match) -> dict[str, Tensor]:
        """``(B, 2, A)`` features that a token has alone, of every candidate and its partner."""
        tokens, context = moment.tokens, moment.context
        found: dict[str, Tensor] = {}
        if "cls_attention" in self.features:
            assert context.cls_attention is not None
            attention = context.cls_attention[:, tokens.prefix :]
            found["cls_attention"] = log_relative(attention, tokens.visual_alive)[..., 0]
        if "size" in self.features:
            found["size"] = tokens.size[:, tokens.prefix :].clamp(min=1).log_()
        if "token" in self.features:
            length = torch.linalg.vector_norm(tokens.rows, dim=1, dtype=torch.float32)
            length = length.clamp_(min=1e-6)
            shape = tokens.alive.shape
            length = length.view(shape) if tokens.packing is None else tokens.packing.unpack(length)
            found["length"] = length[:, tokens.prefix :]
        if not found:
            return {}
        pair = torch.stack([match.token, match.partner], 1).flatten(1) - tokens.prefix
        each = torch.stack(list(found.values()), 1)
        each = each.gather(2, pair[:, None].expand(-1, len(found), -1))
        pairs = each.unflatten(2, (2, -1)).unbind(1)
        return dict(zip(found, pairs, strict=True))

    def apply(self, moment: Moment, action: Tensor | None) -> Tokens:
        """Merge. ``action``: ``(B, A)`` 1 for each pair to merge, or ``(B, 1)`` index in grid."""
        assert moment.match is not None and action is not None
        if self.action == "pairs":
            accept = action if action.dtype == torch.bool else action == MERGE
        else:
            grid = whole_numbers(self.grid, action.device)
            accept = reduction.strongest(moment.match, grid[action])
        return reduction.merge(
            moment.tokens, moment.match, accept, left=moment.left, shuffle=self.shuffle
        )


_USUAL, _SPREAD = 0.9, 0.05


def scaled(cosine: Tensor) -> Tensor:
    """``(c - 0.9) / 0.05``: spreads the cosines of similar tokens over a range near 1."""
    return (cosine - _USUAL) / _SPREAD


def _curve(score: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Similarity of the best pair, then of the last pair that each further choice merges.

    Args:
        score: ``(B, A)`` cosines of the candidate pairs.
        grid: how many pairs each choice merges.

    Returns:
        ``(B, len(grid))`` as :func:`scaled`; 0 for a choice of more pairs than there are.
    """
    # One more column, so that there is a last one if no pair is left.
    ordered = F.pad(score.sort(1, descending=True).values.clamp(min=-1.0), (0, 1), value=-1.0)
    last = whole_numbers((0, *(count - 1 for count in grid[1:])), score.device)
    taken = ordered[:, last.clamp(max=ordered.shape[1] - 1)]
    return torch.where((last < ordered.shape[1]) & (taken > -1.0), scaled(taken), 0.0)


def _product(tokens: Tokens, match: Match) -> Tensor:
    """``(B, A)`` dot product of the embeddings of each pair; any value for a pair that is none."""
    rows = tokens.rows
    one, other = (rows.index_select(0, tokens.row(index).flatten()) for index in match[:2])
    return one.float().mul(other).sum(1).view(match.score.shape)
