"""A timm Vision Transformer cut at its blocks: embed, attend, feed, classify."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokenenv.errors import UserError
from tokenenv.vit import attention, blocks
from tokenenv.vit.blocks import Wanted
from tokenenv.vit.packing import unpack
from tokenenv.vit.tokens import Tokens


@dataclass(frozen=True)
class Context:
    """What decisions may want to know of a block's attention.

    Attributes:
        keys: ``(B, heads, N, head_dim)`` keys as attention used them, or None.
        mean_keys: ``(B, N, head_dim)`` their mean over the heads, or None.
        cls_attention: ``(B, N)`` attention of the class token, mean over the heads, masked to
            the living tokens, or None.
        value_norms: ``(B, N)`` lengths of the values, all heads together, or None.
        attention: ``(B, heads, N, N)`` from query to key, masked to the living keys, or None.
    """

    keys: Tensor | None = None
    mean_keys: Tensor | None = None
    cls_attention: Tensor | None = None
    value_norms: Tensor | None = None
    attention: Tensor | None = None


class Backbone(nn.Module):
    """A timm ``VisionTransformer`` in stages.

    ViT, DeiT (distilled too), register tokens, pre-norm (CLIP), LayerScale (DINOv2, DeiT-3),
    qk-norm, models without a class token, any patch and image size. Playing all stages without
    touching the tokens gives the model's own logits.

    Args:
        model: the timm model; it is used as it is, not copied.
        freeze: whether to put it into ``eval`` mode and to freeze its parameters.

    Raises:
        UserError: for an architecture whose stages are not known; the message names the part.
    """

    compiled = False
    """Whether the parts of a block run through ``torch.compile``: one graph for every length."""

    def __init__(self, model: nn.Module, *, freeze: bool = True) -> None:
        check_supported(model)
        super().__init__()
        if freeze:
            model.eval().requires_grad_(False)
        # What timm's modules hold is not typed; Any here keeps it out of every line below.
        self.model = cast(Any, model)
        self.blocks = cast(Any, self.model.blocks)
        self.depth = len(self.blocks)
        self.dim: int = self.model.embed_dim
        self.prefix: int = self.model.num_prefix_tokens
        self.has_class_token = getattr(model, "cls_token", None) is not None
        self.grid: tuple[int, int] = self.model.patch_embed.grid_size
        self.patches = self.grid[0] * self.grid[1]
        self.classes: int = self.model.num_classes

    @property
    def architecture(self) -> str:
        """The name timm knows the model by; empty where it was not made by name."""
        return getattr(self.model, "pretrained_cfg", {}).get("architecture") or ""

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self._parameter.device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' floating-point type."""
        return self._parameter.dtype

    @property
    def _parameter(self) -> nn.Parameter:
        return self.blocks[0].attn.qkv.weight

    def forward(self, images: Tensor) -> Tensor:
        """The dense model: images ``(B, C, H, W)`` -> logits ``(B, classes)``."""
        return self.model(images)

    def embed(self, images: Tensor) -> Tokens:
        """Images ``(B, C, H, W)``, normalised -> the tokens before block 0."""
        model = self.model
        x = model._pos_embed(model.patch_embed(images))
        return Tokens.start(
            model.norm_pre(x),
            self.prefix,
            keep_one=self._pools_patches,
        )

    def attend(
        self,
        block: int,
        tokens: Tokens,
        *,
        keys: bool = False,
        mean_keys: bool = False,
        cls_attention: bool = False,
        value_norms: bool = False,
        matrix: bool = False,
        proportional: bool = False,
    ) -> tuple[Tokens, Context]:
        """Attention and its residual of block ``block``.

        Args:
            block: 0-based index.
            tokens: tokens before the block.
            keys: whether the context shall hold the keys.
            mean_keys: whether it shall hold their mean over the heads.
            cls_attention: whether it shall hold the class token's attention; only that one row
                of the attention matrix is computed beside the fused kernel.
            value_norms: whether it shall hold the lengths of the values.
            matrix: whether it shall hold the whole attention, which is computed once more beside
                the fused kernel.
            proportional: whether a merged token weighs as many keys as the patches it stands for
                (ToMe's proportional attention, equation 1: softmax(q k + log size)).

        Returns:
            The tokens between attention and MLP, and the context.

        Raises:
            UserError: ``cls_attention`` of a model without a class token.
        """
        if cls_attention and not self.has_class_token:
            raise UserError(
                "cls_attention needs a class token and this model has none: "
                "choose features or a policy without it"
            )
        b, packing = self.blocks[block], tokens.packing
        bias = tokens.size_bias if proportional else None
        mask = tokens.key_mask if bias is None else bias
        want = Wanted(matrix, keys or matrix, mean_keys, value_norms, cls_attention)
        ran = blocks.attend(self._parts, b, tokens, mask if packing is None else bias, want)

        def lay(values: Tensor | None) -> Tensor | None:
            return values if packing is None or values is None else packing.unpack(values)

        q, k, scores = lay(ran.queries), lay(ran.keys), lay(ran.scores)
        return tokens.with_x(ran.x), Context(
            keys=k.transpose(1, 2) if keys and k is not None else None,
            mean_keys=lay(ran.mean_keys),
            cls_attention=attention.class_row(scores, self.head_dim(block), mask)
            if scores is not None
            else None,
            value_norms=lay(ran.value_norms),
            attention=attention.matrix(q, k, mask) if q is not None and k is not None else None,
        )

    def attend_gated(self, block: int, tokens: Tokens, keep: Tensor) -> Tokens:
        """:meth:`attend` where tokens leave by a factor that has a gradient, for training.

        ``keep``: ``(B, N)`` 1 for a token that is there, 0 for one that left; in place of
        ``alive``. See :func:`tokenenv.vit.attention.gated`.
        """
        b = self.blocks[block]
        h, q, k, v = blocks.PLAIN.enter(b, tokens.x)
        return tokens.with_x(blocks.PLAIN.leave(b, tokens.x, h, attention.gated(q, k, v, keep)))

    def feed(self, block: int, tokens: Tokens) -> Tokens:
        """MLP and its residual of block ``block``."""
        return tokens.with_x(blocks.feed(self._parts, self.blocks[block], tokens))

    @property
    def _parts(self) -> blocks.Parts:
        if not self.compiled:
            return blocks.PLAIN
        heads = self.blocks[0].attn.num_heads
        return blocks.compiled_parts((self.dim, heads, self.dtype, self.device.type))

    def attention_dim(self, block: int) -> int:
        """Width of all heads together in block ``block``."""
        return self.blocks[block].attn.attn_dim

    def head_dim(self, block: int) -> int:
        """Width of one head in block ``block``."""
        return self.blocks[block].attn.head_dim

    def normalised(self, block: int, x: Tensor) -> Tensor:
        """Embeddings ``(..., D)`` through the LayerNorm in front of block ``block``'s attention."""
        return self.blocks[block].norm1(x)

    def summary(self, tokens: Tokens) -> Tensor:
        """``(B, D)`` float32 the class token; without one the mean patch, merged ones by size."""
        if self.has_class_token:
            if tokens.packing is not None:
                return tokens.x.index_select(0, tokens.packing.ends[:-1]).float()
            return tokens.x[:, 0].float()
        tokens = unpack(tokens)
        weight = tokens.size[:, tokens.prefix :] * tokens.visual_alive
        weight = weight / weight.sum(1, keepdim=True).clamp(min=1)
        return (tokens.visual.float() * weight[..., None]).sum(1)

    def classify(self, tokens: Tokens) -> Tensor:
        """Tokens after the last block -> logits ``(B, classes)``.

        Average pooling weights each living token by the number of patches it stands for.
        """
        model = self.model
        pool = getattr(model, "global_pool", "token")
        if not self._pools_patches:
            # The head reads prefix tokens only; the final norm works token by token.
            return model.forward_head(model.norm(tokens.x[:, : self.prefix]))
        x = model.norm(tokens.x)
        if not tokens.moved and not tokens.ragged:
            return model.forward_head(x)
        first = 0 if model.pool_include_prefix else self.prefix
        x, alive, size = x[:, first:], tokens.alive[:, first:], tokens.size[:, first:]
        if model.attn_pool is not None:
            pooled = model.attn_pool(x, attn_mask=alive[:, None, None, :])
        else:
            mean = (x * size[..., None].to(x.dtype)).sum(1) / size.sum(1, keepdim=True).to(x.dtype)
            peak = x.masked_fill(~alive[..., None], -torch.inf).amax(1)
            pooled = {"avg": mean, "max": peak, "avgmax": 0.5 * (mean + peak)}[pool]
        return model.head(model.head_drop(model.fc_norm(pooled)))

    @property
    def _pools_patches(self) -> bool:
        model = self.model
        return getattr(model, "attn_pool", None) is not None or model.global_pool != "token"


def check_supported(model: nn.Module) -> None:
    """Raise :class:`UserError` unless every stage of ``model`` is known."""
    from timm.layers import Attention
    from timm.models.vision_transformer import Block, VisionTransformer

    name = getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__

    def refuse(what: str) -> UserError:
        return UserError(
            f"model '{name}' is not supported: {what}; "
            "use a model of timm's VisionTransformer family (ViT, DeiT, CLIP, DINOv2 ...)"
        )

    if not isinstance(model, VisionTransformer):
        raise refuse(f"{type(model).__name__} is not timm's VisionTransformer")
    for i, block in enumerate(model.blocks):
        if type(block) is not Block:
            raise refuse(f"block {i} is a {type(block).__name__}, not a Block")
        if type(block.attn) is not Attention:
            raise refuse(f"block {i} attends with {type(block.attn).__name__}, not Attention")
        if not isinstance(getattr(block.attn.qkv, "weight", None), nn.Parameter):
            raise refuse(f"the linear layers of block {i} are {type(block.attn.qkv).__name__}")
    if getattr(model.patch_drop, "prob", 0):
        raise refuse("it drops patches while it is trained: make it with patch_drop_rate=0")
    if not model.num_classes:
        raise refuse("it has no classifier head: make it with num_classes above 0")
    if model.attn_pool is not None:
        if type(model.attn_pool).__name__ != "AttentionPoolLatent":
            raise refuse(f"it pools with {type(model.attn_pool).__name__}")
        if model.attn_pool.pos_embed is not None:
            raise refuse("its attention pool has position embeddings of its own")
    elif model.global_pool not in ("token", "avg", "max", "avgmax"):
        raise refuse(
            f"global_pool='{model.global_pool}' is not a pooling of tokens into one vector"
        )
