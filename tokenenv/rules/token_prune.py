"""RL4EViT: one agent per visual token, keep or prune before some blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenenv import reduction
from tokenenv.backbone import Backbone, Context
from tokenenv.errors import UserError
from tokenenv.rules.observation import Observation
from tokenenv.tokens import Tokens

PRUNE, KEEP = 0, 1
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


def spread_blocks(depth: int, count: int = 3) -> tuple[int, ...]:
    """``count`` decision blocks spread evenly over ``depth`` blocks: 3, 6, 9 of 12."""
    return tuple(round(depth * (i + 1) / (count + 1)) for i in range(count))


@dataclass(frozen=True)
class TokenPrune:
    """The rules of RL4EViT (Lu et al., ICME 2025), one agent per visual token.

    Before each decision block every living token keeps (1) or prunes (0) itself. A pruned token
    never returns; prefix tokens always stay.

    Attributes:
        blocks: indices of the decision blocks, strictly increasing.
        features: what an agent sees of its own token, in this order: ``token``, the embedding
            through the LayerNorm of the coming block (D numbers; raw residual-stream values
            would saturate a small network); ``position``, sine and cosine of row and column (8);
            ``progress``, one-hot decision and share of living tokens (decisions + 1);
            ``cls_attention``, log of the class token's attention in the block before, relative
            to the mean over living tokens (1); ``redundancy``, highest cosine of its mean-head key
            with the key of a living token that has more of the class token's attention: how well
            a better one could stand in for it (1); ``similarity``, cosine of the token with the
            image's class token and with its mean living token (2); ``norm``, log length of the
            raw embedding, relative to the image's mean (1); ``agent_id``, the one-hot id of the
            paper's code (P numbers, binds a policy to one image size).
        share: whether agents also see the image's class token; without it an actor sees its own
            token alone, as in the paper.
    """

    blocks: tuple[int, ...] = (3, 6, 9)
    features: tuple[str, ...] = ("token", "position", "progress", "cls_attention")
    share: bool = True

    def __post_init__(self) -> None:
        if not all(isinstance(block, int) for block in self.blocks):
            raise UserError(f"blocks={_slashed(self.blocks)} must be whole numbers such as 3/6/9")
        if not self.blocks or list(self.blocks) != sorted(set(self.blocks)) or self.blocks[0] < 0:
            raise UserError(
                f"blocks={_slashed(self.blocks)} must be strictly increasing block indices from 0"
            )
        if not self.features or len(set(self.features)) < len(self.features):
            raise UserError(f"features={self.features!r}: name at least one, each only once")
        unknown = [f for f in self.features if f not in FEATURES]
        if unknown:
            raise UserError(f"unknown feature '{unknown[0]}': choose from {', '.join(FEATURES)}")

    def check(self, backbone: Backbone) -> None:
        """Raise :class:`UserError` where these rules don't fit the backbone."""
        if self.blocks[-1] >= backbone.depth:
            raise UserError(
                f"decision block {self.blocks[-1]} is out of range: the model has blocks "
                f"0 to {backbone.depth - 1}"
            )
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
        """What the attention of ``block`` has to yield: arguments of ``Backbone.attend``."""
        before_decision = block + 1 in self.blocks
        redundancy = before_decision and "redundancy" in self.features
        row = before_decision and "cls_attention" in self.features
        return {"keys": redundancy, "cls_attention": row or redundancy}

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

    def layout(self, backbone: Backbone) -> dict[str, slice]:
        """Where each feature lies in an agent's observation."""
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

    def agent_dim(self, backbone: Backbone) -> int:
        """F: numbers in what an agent sees of its own token."""
        return max(s.stop for s in self.layout(backbone).values())

    def state_dim(self, backbone: Backbone) -> int:
        """S: class token (mean token without one), one-hot step, share of living tokens."""
        return backbone.dim + len(self.blocks) + 1

    def shared_dim(self, backbone: Backbone) -> int:
        """G: numbers every agent of an image sees beside its own."""
        return backbone.dim if self.share else 0

    def observe(
        self,
        backbone: Backbone,
        tokens: Tokens,
        step: int,
        context: Context,
        *,
        state: bool = False,
    ) -> Observation:
        """What the agents see before decision ``step``.

        Args:
            backbone: the model.
            tokens: ``(B, N)`` tokens before the decision block.
            step: 0-based decision.
            context: of the block before; holds what :meth:`wants` asked for.
            state: whether the global state is needed.

        Returns:
            An observation over the ``N - prefix`` visual tokens as they lie.
        """
        batch, active = len(tokens.x), tokens.visual_alive
        normalised = backbone.normalised(self.blocks[step], tokens.x).float()
        visual = normalised[:, tokens.prefix :]
        mean = _mean_over(visual, active)
        whole = normalised[:, 0] if backbone.has_class_token else mean
        progress = whole.new_zeros(batch, len(self.blocks) + 1)
        progress[:, step] = 1.0
        progress[:, -1] = active.sum(1) / tokens.source.shape[1]

        own: list[Tensor] = []
        for name in self.features:
            if name == "token":
                own.append(visual)
            elif name == "position":
                code = _position_code(backbone.grid, tokens.x.device)
                own.append(tokens.from_patches(code.expand(batch, -1, -1)))
            elif name == "progress":
                own.append(progress[:, None].expand(-1, visual.shape[1], -1))
            elif name == "cls_attention":
                assert context.cls_attention is not None
                own.append(_log_relative(context.cls_attention[:, tokens.prefix :], active))
            elif name == "redundancy":
                own.append(_redundancy(tokens, context))
            elif name == "similarity":
                anchors = F.normalize(torch.stack([whole, mean], dim=2), dim=1)
                own.append(F.normalize(visual, dim=2) @ anchors)
            elif name == "norm":
                own.append(_log_relative(tokens.visual.float().norm(dim=-1), active))
            else:
                eye = torch.eye(backbone.patches, device=tokens.x.device)
                own.append(tokens.from_patches(eye.expand(batch, -1, -1)))
        return Observation(
            agents=torch.cat(own, dim=-1) * active[..., None],
            shared=whole if self.share else whole[:, :0],
            active=active,
            step=step,
            layout=self.layout(backbone),
            state=torch.cat([whole, progress], dim=1) if state else None,
        )

    def apply(self, tokens: Tokens, action: Tensor) -> Tokens:
        """Prune the living tokens whose action is 0. ``action``: ``(B, N - prefix)`` integers."""
        return reduction.prune(tokens, action != PRUNE)


def _slashed(blocks: Sequence[int]) -> str:
    return "/".join(str(b) for b in blocks)


def _mean_over(values: Tensor, active: Tensor) -> Tensor:
    """``(B, A, D)`` -> ``(B, D)`` mean over the active."""
    weight = active / active.sum(1, keepdim=True).clamp(min=1)
    return (values * weight[..., None]).sum(1)


def _log_relative(values: Tensor, active: Tensor) -> Tensor:
    """``(B, A)`` -> ``(B, A, 1)`` log of positive values over their mean among the active.

    At least -4; 0 for the others.
    """
    mean = _mean_over(values[..., None], active)
    relative = (values / mean.clamp(min=1e-12)).clamp(min=1e-12).log().clamp(min=-4.0)
    return (relative * active)[..., None]


def _redundancy(tokens: Tokens, context: Context) -> Tensor:
    """``(B, A, 1)`` highest cosine with a living token of more attention; -1 for the first."""
    assert context.keys is not None and context.cls_attention is not None
    key = F.normalize(context.keys.mean(1)[:, tokens.prefix :].float(), dim=-1)
    rank = context.cls_attention[:, tokens.prefix :] * tokens.visual_alive
    if rank.shape[1] == 0:  # every visual token of the batch is gone
        return rank[..., None]
    better = rank[:, None, :] > rank[:, :, None]
    return (key @ key.transpose(1, 2)).masked_fill(~better, -1.0).amax(2)[..., None]


def _position_code(grid: tuple[int, int], device: torch.device) -> Tensor:
    """``(P, 8)`` sine and cosine of row and column at two wavelengths, row-major patches."""
    rows = torch.linspace(0, 1, grid[0], device=device)[:, None].expand(grid)
    cols = torch.linspace(0, 1, grid[1], device=device)[None, :].expand(grid)
    angle = torch.stack([rows, cols], dim=-1).reshape(-1, 2) * torch.pi
    angle = torch.cat([angle, 2 * angle], dim=-1)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)
