"""The family of timm's ``VisionTransformer`` with blocks of class ``Block``."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from tokenenv.artefact import Within
from tokenenv.vit import hooks
from tokenenv.vit.families.base import Family

POOLINGS = Literal["", "avg", "avgmax", "max", "token", "map"]
"""What timm's ``global_pool`` can be."""


class VisionTransformerFamily(Family):
    """ViT, DeiT (distilled, too), CLIP, DINOv2, DeiT-3, SigLIP and others that timm builds alike.

    With or without class token, registers, pre-norm, LayerScale, qk-norm; any patch and image
    size. A subclass for other blocks overrides :meth:`block_refusal`, :meth:`enter`,
    :meth:`leave` and :meth:`feed`, and, if its blocks have no ``attn``, ``mlp`` or ``norm1``, the
    methods that read these.
    """

    name = "vision_transformer"
    OPTIONS: ClassVar[dict[str, Any]] = {
        **Family.OPTIONS,
        "global_pool": POOLINGS,
        "dynamic_img_size": bool,
        "dynamic_img_pad": bool,
        **dict.fromkeys(
            ("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"),
            Within(0.0, 1.0),
        ),
    }

    @classmethod
    def refusal(cls, model: nn.Module) -> str | None:
        """The reason, from the class, blocks, head and patch dropout; None if it is accepted."""
        from timm.models.vision_transformer import VisionTransformer

        if not isinstance(model, VisionTransformer):
            name = type(model).__name__
            if name == VisionTransformer.__name__:  # torchvision's has the same name
                name = f"{name} of {type(model).__module__}"
            return f"{name} is not timm's VisionTransformer"
        for i, block in enumerate(model.blocks):
            if (reason := cls.block_refusal(i, block)) is not None:
                return reason
        if getattr(model.patch_drop, "prob", 0):
            return "it drops patches while it is trained: make it with patch_drop_rate=0"
        if not model.num_classes:
            return "it has no classifier head: make it with num_classes above 0"
        if model.attn_pool is not None:
            if type(model.attn_pool).__name__ != "AttentionPoolLatent":
                return f"it pools with {type(model.attn_pool).__name__}"
            if model.attn_pool.pos_embed is not None:
                return "its attention pool has position embeddings of its own"
        elif model.global_pool not in ("token", "avg", "max", "avgmax"):
            return f"global_pool='{model.global_pool}' is not a pooling of tokens into one vector"
        return None

    @classmethod
    def block_refusal(cls, i: int, block: Any) -> str | None:
        """The reason why ``block``, of index ``i``, is not supported; None if it is."""
        from timm.models.vision_transformer import Block

        if type(block) is not Block:
            return f"block {i} is a {type(block).__name__}, not a Block"
        return attention_refusal(i, block.attn)

    def embed(self, images: Tensor) -> Tensor:
        """Patch embedding, prefix tokens, position embeddings, and the pre-norm if there is one."""
        model = self.model
        return model.norm_pre(model._pos_embed(model.patch_embed(images)))

    @staticmethod
    def enter(block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The normalised tokens ``(..., D)``, and :func:`queries_keys_values` of them."""
        h = block.norm1(x)
        return h, *queries_keys_values(block.attn, h)

    @staticmethod
    def leave(block: Any, x: Tensor, h: Tensor, out: Tensor) -> Tensor:
        """As in timm's block, with stochastic depth and LayerScale if it has them."""
        return x + block.drop_path1(block.ls1(projected(block.attn, h, out)))

    @staticmethod
    def feed(block: Any, x: Tensor) -> Tensor:
        """As in timm's block, with stochastic depth and LayerScale if it has them."""
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

    @property
    def parameter(self) -> nn.Parameter:
        """The weight of block 0's projection to queries, keys and values, unless quantised."""
        weight = self.blocks[0].attn.qkv.weight
        return weight if isinstance(weight, nn.Parameter) else super().parameter

    @property
    def pooling(self) -> str:
        """``attention`` if the model has an attention pool, else timm's ``global_pool``."""
        return "attention" if self.model.attn_pool is not None else self.model.global_pool

    @property
    def first_pooled(self) -> int:
        """0 if the model pools its prefix tokens, too, else their number."""
        return 0 if self.model.pool_include_prefix else self.prefix

    def pool(self, x: Tensor, alive: Tensor, size: Tensor) -> Tensor:
        """Attention pooling reads all kept tokens with the same weight, whatever their size."""
        if self.model.attn_pool is not None:
            return self.model.attn_pool(x, attn_mask=alive[:, None, None, :])
        return super().pool(x, alive, size)

    def options(self) -> dict[str, Any]:
        """What shows in images of other sizes and in training, too, such as the drop rates."""
        return super().options() | own_options(self.model, self.model.blocks[-1])


def own_options(model: Any, last: Any) -> dict[str, Any]:
    """Arguments that only timm's ``VisionTransformer`` has, of a model and its last block."""
    return {
        "global_pool": model.global_pool,
        "dynamic_img_size": bool(model.dynamic_img_size),
        "dynamic_img_pad": bool(getattr(model.patch_embed, "dynamic_img_pad", False)),
        "drop_rate": model.head_drop.p,
        "pos_drop_rate": model.pos_drop.p,
        "proj_drop_rate": last.attn.proj_drop.p,
        "attn_drop_rate": last.attn.attn_drop.p,
        "drop_path_rate": getattr(last.drop_path1, "drop_prob", 0.0),
    }


def attention_refusal(i: int, attn: nn.Module) -> str | None:
    """The reason why block ``i``'s ``attn`` is not timm's ``Attention``; None if it is."""
    from timm.layers import Attention

    if type(attn) is not Attention:
        return f"block {i} attends with {type(attn).__name__}, not Attention"
    if not isinstance(getattr(attn.qkv, "weight", None), nn.Parameter):
        kind = type(attn.qkv)
        return (
            f"the linear layers of block {i} are {kind.__name__} of {kind.__module__}, quantised "
            "or replaced: do that after the model is compressed"
        )
    return None


def queries_keys_values(attn: Any, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``(..., heads, head_dim)`` of timm's ``Attention`` for ``h``."""
    hooks.entering(attn, h)
    q, k, v = attn.qkv(h).unflatten(-1, (3, attn.num_heads, attn.head_dim)).unbind(-3)
    return attn.q_norm(q), attn.k_norm(k), v


def projected(attn: Any, h: Tensor, out: Tensor) -> Tensor:
    """The output projection of timm's ``Attention``, ``(..., D)``.

    Args:
        attn: the module.
        h: ``(..., D)`` its input.
        out: ``(..., heads, head_dim)`` the output of attention.
    """
    out = attn.norm(out.flatten(-2))
    if getattr(attn, "gate", None) is not None:
        out = out * attn.gate(h).sigmoid()
    out = attn.proj_drop(attn.proj(out))
    hooks.leaving(attn, h, out)
    return out
