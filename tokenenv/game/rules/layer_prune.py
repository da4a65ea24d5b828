"""DORA, pruning: one agent per block chooses how many tokens are pruned, or which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tokenenv.errors import UserError, check_choice
from tokenenv.game.checks import check_blocks, check_features, check_range
from tokenenv.game.reduction import Moment
from tokenenv.game.rules import layer
from tokenenv.game.rules.base import Rules
from tokenenv.game.rules.features import log_relative, redundancy, whole_numbers
from tokenenv.game.rules.observation import Observation
from tokenenv.vit import reduction
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.tokens import Tokens

PRUNE = 0
FEATURES = ("keys", "cls_attention", "redundancy")
Action = Literal["tokens", "count"]
Selector = Literal["redundancy", "cls_attention"]
LEAST = 4
"""Visual tokens that always stay (section "Setting" of the paper)."""


@dataclass(frozen=True)
class LayerPrune(Rules):
    """Remove tokens between attention and MLP of every block (DORA, arXiv 2609.34325).

    Removed tokens still take part in the block's attention. At least four visual tokens stay;
    prefix tokens always do.

    Attributes:
        blocks: indices of the decision blocks, strictly increasing.
        action: ``tokens``: keep (1) or prune (0) for every visual token, with one agent per patch;
            an action that would leave fewer than four tokens prunes none. ``count``: one number
            per block, an index into :meth:`budgets`; ``selector`` ranks the tokens.
        budget_step: spacing s of the budgets {0, s, 2 s, ..., P - 4}; the paper's is 2.
        selector: which tokens ``count`` prunes first: those with the highest ``redundancy``, or
            those with the lowest ``cls_attention``.
        features: features of a token (``tokens``), widths in parentheses. ``keys``: its key, all
            heads concatenated. ``cls_attention``: log of the class token's attention relative to
            the mean (1). ``redundancy``: highest cosine of its mean-head key with that of a token
            that has more of the class token's attention (1).
    """

    blocks: tuple[int, ...] = tuple(range(12))
    action: Action = "tokens"
    budget_step: int = 2
    selector: Selector = "redundancy"
    features: tuple[str, ...] = ("keys",)
    traces = False
    face_defaults: ClassVar[dict[str, Any]] = {"action": "count"}

    def __post_init__(self) -> None:
        check_blocks(self.blocks)
        check_features(self.features, FEATURES)
        check_choice("action", self.action, Action)
        check_choice("selector", self.selector, Selector)
        if self.budget_step < 1:
            raise UserError(f"budget_step={self.budget_step} must be at least 1")

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
        if backbone.patches <= LEAST:
            raise UserError(
                f"the model has {backbone.patches} visual tokens and {LEAST} always stay: "
                f"use a model with more than {LEAST}"
            )
        if self.budget_step > backbone.patches - LEAST:
            raise UserError(
                f"budget_step={self.budget_step} doesn't fit {backbone.patches} visual tokens, of "
                f"which {LEAST} stay: give at most {backbone.patches - LEAST}"
            )
        for name in ("cls_attention", "redundancy"):
            if name in self._observed and not backbone.has_class_token:
                raise UserError(
                    f"'{name}' needs a class token and this model has none: "
                    + ("leave it out" if self.action == "tokens" else "choose action='tokens'")
                )

    @property
    def _observed(self) -> tuple[str, ...]:
        return self.features if self.action == "tokens" else (self.selector,)

    def budgets(self, patches: int) -> tuple[int, ...]:
        """Number of tokens that each choice of ``count`` prunes, from 0."""
        return tuple(range(0, patches - LEAST + 1, self.budget_step))

    def actions(self, backbone: Backbone) -> int:
        """2, prune and keep; or, with ``count``, the number of budgets."""
        return 2 if self.action == "tokens" else len(self.budgets(backbone.patches))

    def agents(self, backbone: Backbone) -> int:
        """One per patch; 1 with ``count``."""
        return backbone.patches if self.action == "tokens" else 1

    def deciders(self, visual: Tensor) -> Tensor:
        """One per token; 1 with ``count``."""
        return visual if self.action == "tokens" else torch.ones_like(visual)

    def wants(self, block: int) -> dict[str, bool]:
        """What the attention of ``block`` must return: arguments of ``Backbone.attend``."""
        due = block in self.blocks
        redundancy = due and "redundancy" in self._observed
        row = due and "cls_attention" in self._observed
        return {"keys": due, "mean_keys": redundancy, "cls_attention": row or redundancy}

    def macs(self, backbone: Backbone, block: int, tokens: Tensor) -> Tensor:
        """Multiply-adds of observing ``tokens`` (float, prefix included)."""
        total = torch.zeros_like(tokens)
        if "cls_attention" in self._observed or "redundancy" in self._observed:
            total = total + tokens * backbone.attention_dim(block)
        if "redundancy" in self._observed:
            total = total + (tokens - backbone.prefix) ** 2 * backbone.head_dim(block)
        return total

    def layout(self, backbone: Backbone) -> dict[str, slice]:
        """The slice of each named feature in an agent's own features."""
        layout, start = {}, 0
        for name in self._observed:
            width = self._key_dim(backbone) if name == "keys" else 1
            layout[name] = slice(start, start + width)
            start += width
        return layout

    def _key_dim(self, backbone: Backbone) -> int:
        return max(map(backbone.attention_dim, self.blocks))

    def agent_dim(self, backbone: Backbone) -> int:
        """Number F of an agent's own features; 0 with ``count``, which has only shared ones."""
        return 0 if self.action == "count" else super().agent_dim(backbone)

    def shared_dim(self, backbone: Backbone) -> int:
        """Width G of the class token's key, the one-hot decision and the history."""
        return self._key_dim(backbone) + len(self.blocks) + layer.HISTORY_DIM

    def state_dim(self, backbone: Backbone) -> int:
        """Width of :func:`tokenenv.game.rules.layer.state`."""
        return layer.state_dim(backbone, len(self.blocks))

    def to_roster(self, backbone: Backbone, tokens: Tokens, values: Tensor) -> Tensor:
        """Patch ``p`` has agent ``p``: ``(B, N - prefix, ...)`` -> ``(B, P, ...)``."""
        return tokens.to_patches(values) if self.action == "tokens" else values

    def from_roster(self, tokens: Tokens, values: Tensor) -> Tensor:
        """``(B, P, ...)`` -> ``(B, N - prefix, ...)``."""
        return tokens.from_patches(values) if self.action == "tokens" else values

    def observe(self, backbone: Backbone, moment: Moment, *, state: bool = False) -> Observation:
        """What the agents observe, in the current order of the tokens; see the class."""
        tokens, context, steps = moment.tokens, moment.context, len(self.blocks)
        alive = tokens.visual_alive
        room = alive.sum(1, keepdim=True) - LEAST
        assert context.keys is not None
        legal = None
        if self.action == "tokens":
            active = alive & (room > 0)
            own = torch.cat([self._see(name, moment) for name in self._observed], 2)
        else:
            active = room >= self.budget_step
            own = tokens.x.new_zeros(len(alive), 1, 0, dtype=torch.float32)
            budgets = self.budgets(tokens.patches)
            legal = (whole_numbers(budgets, room.device) <= room.clamp(min=0))[:, None]
        key = layer.mean_key(backbone, context.keys, alive, tokens.prefix)
        shared = [key, layer.one_hot_step(moment, steps), layer.history(moment)]
        return Observation(
            agents=own * active[..., None],
            shared=torch.cat(shared, 1),
            active=active,
            step=moment.step,
            layout={} if self.action == "count" else self.layout(backbone),
            legal=legal,
            state=layer.state(backbone, moment, steps) if state else None,
        )

    def _see(self, name: str, moment: Moment) -> Tensor:
        """``(B, N - prefix, f)`` the feature ``name`` of every visual token."""
        tokens, context = moment.tokens, moment.context
        if name == "keys":
            assert context.keys is not None
            return context.keys.transpose(1, 2).flatten(2).float()[:, tokens.prefix :]
        if name == "cls_attention":
            assert context.cls_attention is not None
            return log_relative(context.cls_attention[:, tokens.prefix :], tokens.visual_alive)
        return redundancy(tokens, context)

    def apply(self, moment: Moment, action: Tensor | None) -> Tokens:
        """Prune. ``action``: ``(B, N - prefix)`` 0 to prune, or ``(B, 1)`` index of a budget."""
        assert action is not None
        tokens = moment.tokens
        if self.action == "tokens":
            return reduction.prune(tokens, action != PRUNE, least=LEAST)
        alive = tokens.visual_alive
        room = (alive.sum(1, keepdim=True) - LEAST).clamp(min=0)
        budgets = whole_numbers(self.budgets(tokens.patches), action.device)
        score = self._see(self.selector, moment)[..., 0]
        if self.selector == "cls_attention":
            score = -score
        count = torch.minimum(budgets[action], room)
        leaves = reduction.highest(score.masked_fill(~alive, -torch.inf), count)
        return reduction.prune(tokens, ~leaves)
