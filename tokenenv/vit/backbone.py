"""A timm Vision Transformer that runs in stages: embed, attend, feed, classify."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokenenv.errors import UserError
from tokenenv.vit import attention, blocks
from tokenenv.vit.blocks import Wanted
from tokenenv.vit.dense import Dense
from tokenenv.vit.families import Family, family_of
from tokenenv.vit.hooks import Watch
from tokenenv.vit.packing import end_to_end, unpack
from tokenenv.vit.proof import prove
from tokenenv.vit.tokens import Tokens

R = TypeVar("R")


@dataclass(frozen=True)
class Context:
    """What decisions can read of a block's attention; None for what was not asked for.

    Attributes:
        keys: ``(B, heads, N, head_dim)`` keys as attention used them.
        mean_keys: ``(B, N, head_dim)`` their mean over the heads.
        cls_attention: ``(B, N)`` float32 attention of the class token to kept tokens, mean over
            the heads; 0 for removed ones.
        value_norms: ``(B, N)`` float32 norms of the values, all heads together.
        attention: ``(B, heads, N, N)`` float32 attention of queries to kept keys.
        embeddings: ``(B, N, D)`` the tokens after the attention, before the MLP.
    """

    keys: Tensor | None = None
    mean_keys: Tensor | None = None
    cls_attention: Tensor | None = None
    value_norms: Tensor | None = None
    attention: Tensor | None = None
    embeddings: Tensor | None = None


class Backbone(Dense):
    """A timm model of a registered family that runs in stages.

    The family of timm's ``VisionTransformer`` includes ViT, DeiT (distilled, too), register tokens,
    pre-norm (CLIP), LayerScale (DINOv2, DeiT-3), qk-norm, models without a class token, and any
    patch and image size. Running all stages without removing tokens gives the model's own logits.

    Args:
        model: the timm model; it is used as it is, not copied.
        freeze: whether to put it into ``eval`` mode and to freeze its parameters.
        proven: whether it is known already that its stages give the model's own logits; else that
            is checked on two random images, see :func:`tokenenv.vit.proof.prove`.
        family: the family of a model that was made of an accepted one, such as a quantised one;
            None: the first registered one that accepts it.

    Attributes:
        model: as given.
        family: the description of its architecture, see :class:`tokenenv.vit.families.Family`.
        blocks: its transformer blocks.
        depth: number of blocks.
        dim: width ``D`` of the tokens.
        prefix: number of class, distillation and register tokens; they come first.
        has_class_token: whether the first token is a class token.
        grid: rows and columns of patches.
        patches: number of patches ``P``.
        classes: number of classes.

    Raises:
        UserError: no registered family accepts the model, or it has code of its own that its stages
            would leave out; the message names the reason.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        freeze: bool = True,
        proven: bool = False,
        family: type[Family] | None = None,
    ) -> None:
        made = family_of(model) if family is None else family(model)
        super().__init__(model, freeze=freeze)
        self._watch = Watch()
        self.family = made
        self.blocks = made.blocks
        self.depth = len(self.blocks)
        self.dim = made.dim
        self.prefix = made.prefix
        self.has_class_token = made.has_class_token
        self.grid = made.grid
        self.patches = self.grid[0] * self.grid[1]
        self.classes = made.classes
        if not proven and self.device.type != "meta":  # whose tensors have no values
            name = self.architecture or type(model).__name__
            prove(self, self._all_stages, self.image_shape, name)

    def _all_stages(self, images: Tensor) -> Tensor:
        tokens = self.embed(images)
        for block in range(self.depth):
            tokens, _ = self.attend(block, tokens)
            tokens = self.feed(block, tokens)
        return self.classify(tokens)

    @property
    def architecture(self) -> str:
        """The model's name in timm; empty if it was not created by name."""
        return getattr(self.model, "pretrained_cfg", {}).get("architecture") or ""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the model's images, pixels."""
        return self.family.image_shape

    @property
    def device(self) -> torch.device:
        """The parameters' device."""
        return self.family.parameter.device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' floating-point type."""
        return self.family.parameter.dtype

    def embed(self, images: Tensor, *, trace: bool = True) -> Tokens:
        """Images ``(B, C, H, W)``, normalised -> the tokens before block 0.

        ``trace``: whether to keep track of which token stands for which patch.
        """
        x = self.family.embed(images)
        return Tokens.start(x, self.prefix, keep_one=not self.reads_prefix, trace=trace)

    @property
    def reads_prefix(self) -> bool:
        """Whether the head reads prefix tokens only, such as the class token."""
        return self.family.pooling == "token"

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
        embeddings: bool = False,
        proportional: bool = False,
    ) -> tuple[Tokens, Context]:
        """Attention and its residual of block ``block``.

        Args:
            block: 0-based index.
            tokens: tokens before the block.
            keys: whether to return the keys in the context.
            mean_keys: whether to return their mean over the heads.
            cls_attention: whether to return the class token's attention; only this row of the
                attention matrix is computed in addition to the fused kernel.
            value_norms: whether to return the norms of the values.
            matrix: whether to return the whole attention matrix, which is computed in addition to
                the fused kernel.
            embeddings: whether to return the tokens themselves, for who compares them later.
            proportional: whether a token counts as a key once for each patch it stands for (ToMe's
                proportional attention, equation 1: softmax(q k + log size)).

        Returns:
            The tokens between attention and MLP, and the context.

        Raises:
            UserError: ``cls_attention`` is asked of a model without a class token.
        """
        if cls_attention and not self.has_class_token:
            raise UserError(
                "cls_attention needs a class token and this model has none: "
                "choose features or a policy without it"
            )
        b, packing = self.blocks[block], tokens.packing
        bias = tokens.size_bias if proportional else None
        mask = bias
        if bias is None:
            mask = tokens.key_mask if packing is None else packing.hidden
        want = Wanted(matrix, keys or matrix, mean_keys, value_norms, cls_attention)
        drop = self.family.attention_drop(block)
        seen = mask if packing is None else bias
        ran = self._run(
            lambda now: blocks.attend(self.family.parts, b, now, seen, want, drop), tokens
        )
        if not any(want) and not embeddings:
            return tokens.with_x(ran.x), Context()

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
            embeddings=lay(ran.x) if embeddings else None,
        )

    def finish(self, tokens: Tokens, *, proportional: bool = False) -> Tensor:
        """The last block and the head, computed only for the prefix tokens that the head reads.

        Args:
            tokens: the tokens before the last block.
            proportional: as for :meth:`attend`.

        Returns:
            Logits ``(B, classes)``, those of :meth:`attend`, :meth:`feed` and :meth:`classify`.
        """
        block = self.blocks[-1]
        if not (tokens.ragged or tokens.packing or torch.compiler.is_compiling()):
            tokens = end_to_end(tokens)
        bias = tokens.size_bias if proportional else None
        if bias is None and tokens.packing is None:
            bias = tokens.key_mask
        x = blocks.attend_prefix(self.family.parts, block, tokens, bias)
        return self.classify(replace(tokens, x=self.family.parts.feed(block, x), packing=None))

    def attend_gated(self, block: int, tokens: Tokens, keep: Tensor) -> Tokens:
        """:meth:`attend` that removes tokens by a differentiable factor, for training.

        ``keep``: ``(B, N)`` 1 for a kept token, 0 for a removed one; replaces ``tokens.alive``.
        See :func:`tokenenv.vit.attention.gated`.
        """
        b, family = self.blocks[block], self.family
        h, q, k, v = family.enter(b, tokens.x)
        return tokens.with_x(family.leave(b, tokens.x, h, attention.gated(q, k, v, keep)))

    def feed(self, block: int, tokens: Tokens) -> Tokens:
        """MLP and its residual of block ``block``."""
        b = self.blocks[block]
        return tokens.with_x(self._run(lambda now: blocks.feed(self.family.parts, b, now), tokens))

    def through(self, block: int, tokens: Tokens, *, proportional: bool = False) -> Tokens:
        """Block ``block`` as a whole, :meth:`attend` and :meth:`feed` of it.

        Args:
            block: 0-based index.
            tokens: tokens before the block.
            proportional: as for :meth:`attend`.
        """
        if not (tokens.ragged or (proportional and tokens.merged) or torch.is_grad_enabled()):
            x = blocks.through(self.family.parts, self.blocks[block], tokens)
            if x is not None:
                return tokens.with_x(x)
        tokens, _ = self.attend(block, tokens, proportional=proportional)
        return self.feed(block, tokens)

    def warn_of_unheard(self) -> None:
        """Warn of hooks that no stage can call, see :mod:`tokenenv.vit.hooks`."""
        self._watch.warn_of_unheard(self.model, self.blocks)

    def _run(self, part: Callable[[Tokens], R], tokens: Tokens) -> R:
        """A part of a block; of a checkpointed model, what it computes is not kept for autograd."""
        if not (torch.is_grad_enabled() and self.family.checkpointed):
            return part(tokens)
        made: R = checkpoint(lambda x: part(tokens.with_x(x)), tokens.x, use_reentrant=False)
        return made

    @property
    def watched(self) -> bool:
        """Whether hooks look at blocks or at the final norm, so that these have to run whole."""
        return self._watch.sees(self.blocks, getattr(self.model, "norm", None))

    def attention_dim(self, block: int) -> int:
        """Width of all heads together in block ``block``."""
        heads, width = self.family.heads(block)
        return heads * width

    def head_dim(self, block: int) -> int:
        """Width of one head in block ``block``."""
        return self.family.heads(block)[1]

    def normalised(self, block: int, x: Tensor) -> Tensor:
        """Embeddings ``(..., D)`` after the norm that precedes block ``block``'s attention."""
        return self.family.normalised(block, x)

    def summary(self, tokens: Tokens) -> Tensor:
        """``(B, D)`` float32 class token; without one the mean of visual tokens, by size."""
        if self.has_class_token:
            if tokens.packing is not None:
                return tokens.x.index_select(0, tokens.packing.first).float()
            return tokens.x[:, 0].float()
        tokens = unpack(tokens)
        weight = tokens.size[:, tokens.prefix :] * tokens.visual_alive
        weight = weight / weight.sum(1, keepdim=True).clamp(min=1)
        return (tokens.visual.float() * weight[..., None]).sum(1)

    def classify(self, tokens: Tokens) -> Tensor:
        """Tokens after the last block -> logits ``(B, classes)``.

        Average pooling weights each kept token by the number of patches it stands for.
        """
        return self.family.classify(tokens)
