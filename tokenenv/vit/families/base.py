"""The interface of an architecture for backbones, with defaults for timm's transformers."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenenv.artefact import Within
from tokenenv.vit.blocks import Parts
from tokenenv.vit.hooks import watched
from tokenenv.vit.tokens import Tokens


class Family(ABC):
    """A model of an architecture in which every block maps ``(B, N, D)`` tokens to the same shape.

    The abstract methods differ between architectures. The others use timm's usual names of
    attributes (``blocks``, ``patch_embed``, ``norm``, ``forward_head`` ...); a family overrides
    those that its models name differently. A family does not define attention itself: between
    :meth:`enter` and :meth:`leave` it is softmax(q k^T / sqrt(head_dim)) v over all kept tokens.

    Args:
        model: a timm model that :meth:`refusal` accepts; it is used as it is, not copied.
    """

    name: ClassVar[str]
    """The name under which the family is registered."""

    OPTIONS: ClassVar[dict[str, Any]] = {
        "img_size": tuple[Within(1, 4096), Within(1, 4096)],  # type: ignore[misc]
        "in_chans": Within(1, 1024),
    }
    """What :meth:`options` may hold, as kinds of :func:`tokenenv.artefact.fits`; nothing else is
    taken from a file."""

    def __init__(self, model: nn.Module) -> None:
        # timm's modules are not typed.
        self.model: Any = model

    @classmethod
    @abstractmethod
    def refusal(cls, model: nn.Module) -> str | None:
        """The reason why ``model`` is not of this family, naming the part; None if it is."""

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Images ``(B, C, H, W)``, normalised -> ``(B, prefix + P, D)`` tokens before block 0."""

    # The token-wise parts of a block, for (B, N, D) and packed (T, D) tokens. They are static
    # functions of the block, so that torch.compile compiles them once for all blocks.

    @staticmethod
    @abstractmethod
    def enter(block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The part of a block before attention: norm and projections.

        Args:
            block: one of :attr:`blocks`.
            x: ``(..., D)`` the tokens before the block.

        Returns:
            ``(..., any width)`` a tensor that :meth:`leave` gets as ``h``, and queries, keys and
            values ``(..., heads, head_dim)``.
        """

    @staticmethod
    @abstractmethod
    def leave(block: Any, x: Tensor, h: Tensor, out: Tensor) -> Tensor:
        """The part of a block after attention: output projection and residual.

        Args:
            block: one of :attr:`blocks`.
            x: as for :meth:`enter`.
            h: the first tensor that :meth:`enter` returned.
            out: ``(..., heads, head_dim)`` the output of attention.

        Returns:
            ``(..., D)`` the tokens after attention.
        """

    @staticmethod
    @abstractmethod
    def feed(block: Any, x: Tensor) -> Tensor:
        """``(..., D)`` tokens after attention -> ``(..., D)`` after the MLP and its residual."""

    @property
    def parts(self) -> Parts:
        """:meth:`enter`, :meth:`leave` and :meth:`feed` as one object."""
        return Parts(self.enter, self.leave, self.feed)

    @property
    def blocks(self) -> Any:
        """The transformer blocks, first to last."""
        return self.model.blocks

    @property
    def dim(self) -> int:
        """Width ``D`` of the tokens."""
        return self.model.embed_dim

    @property
    def prefix(self) -> int:
        """Number of class, distillation and register tokens; they come before the patches."""
        return self.model.num_prefix_tokens

    @property
    def has_class_token(self) -> bool:
        """Whether the first token is a class token."""
        return getattr(self.model, "cls_token", None) is not None

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.model.num_classes

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.model.patch_embed.grid_size

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of a patch, pixels."""
        return self.model.patch_embed.patch_size

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        embed = self.model.patch_embed
        first = next(m for m in embed.modules() if isinstance(m, nn.Conv2d | nn.Linear))
        channels = first.in_channels if isinstance(first, nn.Conv2d) else 3
        return (channels, *embed.img_size)

    @property
    def parameter(self) -> nn.Parameter:
        """A parameter of block 0; its device and type are taken as the model's."""
        return next(self.blocks[0].parameters())

    @property
    def checkpointed(self) -> bool:
        """Whether blocks are computed anew in the backward pass, as timm's switch says."""
        return bool(getattr(self.model, "grad_checkpointing", False))

    def heads(self, block: int) -> tuple[int, int]:
        """Number of attention heads in block ``block``, and the width of one."""
        attn = self.blocks[block].attn
        return attn.num_heads, attn.head_dim

    def attention_drop(self, block: int) -> float:
        """Dropout probability of block ``block``'s attention weights; 0 in ``eval`` mode."""
        attn = self.blocks[block].attn
        return attn.attn_drop.p if attn.training else 0.0

    def normalised(self, block: int, x: Tensor) -> Tensor:
        """Embeddings ``(..., D)`` after the norm that precedes block ``block``'s attention."""
        return self.blocks[block].norm1(x)

    def linear_layers(self, block: int) -> tuple[list[nn.Linear], list[nn.Linear]]:
        """The linear layers of block ``block``'s attention, and those of its MLP."""
        b = self.blocks[block]
        attention, mlp = (
            [m for m in part.modules() if isinstance(m, nn.Linear)] for part in (b.attn, b.mlp)
        )
        return attention, mlp

    @property
    def pooling(self) -> str:
        """How the head reduces the tokens to one vector.

        ``token``: it reads prefix tokens only. ``avg``, ``max``, ``avgmax``, ``attention``: it
        pools the tokens from :attr:`first_pooled` on.
        """
        return self.model.global_pool

    @property
    def first_pooled(self) -> int:
        """Index of the first token that is pooled; unused with ``pooling="token"``."""
        return self.prefix

    def norm(self, x: Tensor) -> Tensor:
        """The final norm: tokens ``(B, N, D)`` after the last block -> ``(B, N, D)``."""
        return self.model.norm(x)

    def head(self, x: Tensor) -> Tensor:
        """Tokens ``(B, N, D)`` after :meth:`norm`, none removed or merged -> ``(B, classes)``."""
        return self.model.forward_head(x)

    def pool(self, x: Tensor, alive: Tensor, size: Tensor) -> Tensor:
        """Pool tokens of which some were removed or merged.

        Args:
            x: ``(B, N, D)`` tokens after :meth:`norm`, from :attr:`first_pooled` on.
            alive: ``(B, N)`` bool, which tokens are kept.
            size: ``(B, N)`` number of patches each stands for; 0 for a removed token.

        Returns:
            ``(B, D)``.
        """
        mean = (x * size[..., None].to(x.dtype)).sum(1) / size.sum(1, keepdim=True).to(x.dtype)
        peak = x.masked_fill(~alive[..., None], -torch.inf).amax(1)
        return {"avg": mean, "max": peak, "avgmax": 0.5 * (mean + peak)}[self.pooling]

    def logits(self, pooled: Tensor) -> Tensor:
        """The pooled vector ``(B, D)`` of :meth:`pool` -> logits ``(B, classes)``."""
        model = self.model
        return model.head(model.head_drop(model.fc_norm(pooled)))

    def classify(self, tokens: Tokens) -> Tensor:
        """Tokens after the last block -> logits ``(B, classes)``."""
        norm = getattr(self.model, "norm", None)
        if self.pooling == "token" and not watched([norm]):
            # The head reads prefix tokens only, and the final norm is token-wise.
            return self.head(self.norm(tokens.x[:, : self.prefix]))
        x = self.norm(tokens.x)
        if self.pooling == "token":  # the norm's hooks see all tokens, as in the model itself
            return self.head(x[:, : self.prefix])
        if not tokens.moved and not tokens.ragged:
            return self.head(x)
        first = self.first_pooled
        return self.logits(self.pool(x[:, first:], tokens.alive[:, first:], tokens.size[:, first:]))

    def options(self) -> dict[str, Any]:
        """Arguments of ``timm.create_model`` that rebuild the model from its name, as JSON."""
        channels, *size = self.image_shape
        return {"img_size": size, "in_chans": channels}

    @property
    def positions(self) -> Tensor | None:
        """The position embeddings ``(1, P, D)`` or ``(1, prefix + P, D)``; None without any."""
        return self.model.pos_embed

    def resized(self, size: int) -> nn.Module:
        """A copy for images of ``size`` x ``size`` pixels that shares all parameters.

        Its position embeddings are not set; :meth:`take_positions` sets them.
        """
        shared = {id(t): t for t in chain(self.model.parameters(), self.model.buffers())}
        model = copy.deepcopy(self.model, shared)
        model.set_input_size(img_size=(size, size))
        if model.pos_embed is not None:
            del model.pos_embed
        return model

    def take_positions(self, other: Family) -> None:
        """Set the position embeddings to those of ``other``, resampled to this image size."""
        from timm.layers import resample_abs_pos_embed

        assert other.positions is not None
        self.model.pos_embed = resample_abs_pos_embed(
            other.positions,
            new_size=list(self.grid),
            old_size=list(other.grid),
            num_prefix_tokens=0 if self.model.no_embed_class else self.prefix,
        )
