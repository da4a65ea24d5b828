"""RL4EViT: one agent per visual token, keep or prune before some blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenenv.errors import UserError
from tokenenv.game.checks import check_blocks, check_features, check_range, spread_blocks
from tokenenv.game.reduction import Moment
from tokenenv.game.rules.base import Rules
from tokenenv.game.rules.features import log_relative, mean_over, position_code, redundancy
from tokenenv.game.rules.observation import Observation
from tokenenv.vit import reduction
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.tokens import Tokens

PRUNE = 0
DECISIONS = 3
"""Decisions in an episode by default, as in the paper."""

FEATURES = (
    "token",
    "position",
    "progress",
    "cls_attention",
    "redundancy",
    "similarity",
    "norm",
    "agent_id",
)


@dataclass(frozen=True)
class TokenPrune(Rules):
    """The rules of RL4EViT (Lu et al., ICME 2025), one agent per visual token.

    Before each decision block the agent of every token that is left keeps (1) or prunes (0) it. A
    pruned token never returns; prefix tokens always stay.

    Attributes:
        blocks: indices of the decision blocks, strictly increasing.
        features: an agent's own features, in this order, widths in parentheses. ``token``: the
            embedding after the LayerNorm of the coming block (D; raw residual-stream values would
            saturate a small network). ``position``: sine and cosine of row and column (8).
            ``progress``: one-hot decision and share of tokens left (decisions + 1).
            ``cls_attention``: log of the class token's attention in the block before, relative to
            the mean over the tokens left (1). ``redundancy``: highest cosine of its mean-head key
            with the key of a token that has more of the class token's attention (1).
            ``similarity``: cosine of the token with the image's class token and with its mean
            token (2). ``norm``: log norm of the raw embedding, relative to the image's mean (1).
            ``agent_id``: the one-hot id of the paper's code (P; it ties a policy to one image
            size).
        share: whether agents also observe the image's class token; without it they observe only
            their own token, as in the paper.
    """

    blocks: tuple[int, ...] = (3, 6, 9)
    features: tuple[str, ...] = ("token", "position", "progress", "cls_attention")
    share: bool = True
    between: ClassVar[bool] = False
    token_agents: ClassVar[bool] = True
    default_reward: ClassVar[str] = "alpha_beta"

    def __post_init__(self) -> None:
        check_blocks(self.blocks)
        check_features(self.features, FEATURES)

    @property
    def traces(self) -> bool:  # type: ignore[override]
        """Whether a feature depends on a token's patch."""
        return bool({"position", "agent_id"} & set(self.features))

    @classmethod
    def decision_blocks(cls, depth: int, max_cycles: int | None) -> tuple[int, ...]:
        """``max_cycles`` blocks, 3 by default, spread evenly; never block 0."""
        count = DECISIONS if max_cycles is None else max_cycles
        if not 1 <= count < depth:
            raise UserError(
                f"max_cycles={count} decisions don't fit between the model's {depth} blocks: "
                f"choose 1 to {depth - 1}"
            )
        return spread_blocks(depth, count)

    def check(self, backbone: Backbone) -> None:
        """Raise :class:`UserError` if these rules don't fit the backbone."""
        check_range(self.blocks, backbone.depth)
        for name in ("cls_attention", "redundancy"):
            if name in self.features and not backbone.has_class_token:
                raise UserError(
                    f"feature '{name}' needs a class token and this model has none: leave it out"
                )
            if name in self.features and self.blocks[0] == 0:
                raise UserError(
                    f"feature '{name}' is read in the block before a decision: "
                    "there is none before block 0, choose blocks from 1"
                )

    def wants(self, block: int) -> dict[str, bool]:
        """What the attention of ``block`` must return: arguments of ``Backbone.attend``."""
        before_decision = block + 1 in self.blocks
        redundancy = before_decision and "redundancy" in self.features
        row = before_decision and "cls_attention" in self.features
        return {"mean_keys": redundancy, "cls_attention": row or redundancy}

    def macs(self, backbone: Backbone, block: int, tokens: Tensor) -> Tensor:
        """Multiply-adds of observing ``tokens`` (float, prefix included) before ``block``."""
        total = torch.zeros_like(tokens)
        if "cls_attention" in self.features or "redundancy" in self.features:
            total = total + tokens * backbone.attention_dim(block - 1)
        if "redundancy" in self.features:
            total = total + (tokens - backbone.prefix) ** 2 * backbone.head_dim(block - 1)
        if "similarity" in self.features:
            total = total + (tokens - backbone.prefix) * 2 * backbone.dim
        return total

    def agents(self, backbone: Backbone) -> int:
        """One agent per patch."""
        return backbone.patches

    def deciders(self, visual: Tensor) -> Tensor:
        """One agent per token that is left."""
        return visual

    def to_roster(self, backbone: Backbone, tokens: Tokens, values: Tensor) -> Tensor:
        """Patch ``p`` has agent ``p``: ``(B, N - prefix, ...)`` -> ``(B, P, ...)``."""
        return tokens.to_patches(values)

    def from_roster(self, tokens: Tokens, values: Tensor) -> Tensor:
        """``(B, P, ...)`` -> ``(B, N - prefix, ...)``."""
        return tokens.from_patches(values)

    def layout(self, backbone: Backbone) -> dict[str, slice]:
        """The slice of each named feature in an agent's own features."""
        width = {
            "token": backbone.dim,
            "position": 8,
            "progress": len(self.blocks) + 1,
            "cls_attention": 1,
            "redundancy": 1,
            "similarity": 2,
            "norm": 1,
            "agent_id": backbone.patches,
        }
        layout, start = {}, 0
        for name in self.features:
            layout[name] = slice(start, start + width[name])
            start += width[name]
        return layout

    def state_dim(self, backbone: Backbone) -> int:
        """Width S of class token (without one: mean token), one-hot step, share of tokens left."""
        return backbone.dim + len(self.blocks) + 1

    def shared_dim(self, backbone: Backbone) -> int:
        """Number G of features that all agents share: the class token's, or 0."""
        return backbone.dim if self.share else 0

    def observe(self, backbone: Backbone, moment: Moment, *, state: bool = False) -> Observation:
        """What the agents observe: a row for each of the ``N - prefix`` visual tokens."""
        tokens, step, context = moment.tokens, moment.step, moment.context
        batch, active = tokens.x.shape[0], tokens.visual_alive
        # The LayerNorm runs on the class token only, unless a feature needs the others.
        every = {"token", "similarity"} & set(self.features) or not backbone.has_class_token
        seen = tokens.x if every else tokens.x[:, :1]
        normalised = backbone.normalised(self.blocks[step], seen).float()
        visual = normalised[:, tokens.prefix :]
        mean = visual.new_zeros(batch, 0)
        if "similarity" in self.features or not backbone.has_class_token:
            mean = mean_over(visual, active)
        whole = normalised[:, 0] if backbone.has_class_token else mean
        progress = whole.new_zeros(batch, len(self.blocks) + 1)
        progress[:, step] = 1.0
        progress[:, -1] = moment.counts[-1] / tokens.patches

        if tokens.patches != backbone.patches and self.traces:
            raise UserError(
                f"features 'position' and 'agent_id' are made for images of {backbone.patches} "
                f"patches and these have {tokens.patches}: leave them out"
            )
        own: list[Tensor] = []
        for name in self.features:
            if name == "token":
                own.append(visual)
            elif name == "position":
                code = position_code(backbone.grid, tokens.x.device)
                own.append(tokens.from_patches(code.expand(batch, -1, -1)))
            elif name == "progress":
                own.append(progress[:, None].expand(-1, active.shape[1], -1))
            elif name == "cls_attention":
                assert context.cls_attention is not None
                own.append(log_relative(context.cls_attention[:, tokens.prefix :], active))
            elif name == "redundancy":
                own.append(redundancy(tokens, context))
            elif name == "similarity":
                anchors = F.normalize(torch.stack([whole, mean], dim=2), dim=1)
                own.append(F.normalize(visual, dim=2) @ anchors)
            elif name == "norm":
                own.append(log_relative(tokens.visual.float().norm(dim=-1), active))
            else:
                eye = torch.eye(backbone.patches, device=tokens.x.device)
                own.append(tokens.from_patches(eye.expand(batch, -1, -1)))
        agents = torch.cat(own, dim=-1)
        return Observation(
            agents=agents * active[..., None] if tokens.ragged else agents,
            shared=whole if self.share else whole[:, :0],
            active=active,
            step=step,
            layout=self.layout(backbone),
            state=torch.cat([whole, progress], dim=1) if state else None,
        )

    def apply(self, moment: Moment, action: Tensor | None) -> Tokens:
        """Prune the tokens whose action is 0. ``action``: ``(B, N - prefix)`` integers."""
        assert action is not None
        return reduction.prune(moment.tokens, action != PRUNE)
