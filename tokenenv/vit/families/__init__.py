"""The registry of architectures that a backbone can run.

To add one, decorate a subclass of :class:`Family` with :func:`register_family`, as
``examples/extend/own_family.py`` does; nothing else has to be edited.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from tokenenv.artefact import check_fields
from tokenenv.errors import UserError
from tokenenv.own import check_free
from tokenenv.vit.families.base import Family
from tokenenv.vit.families.vision_transformer import VisionTransformerFamily

FAMILIES: dict[str, type[Family]] = {}
"""The registered families by name, in the order in which they are tried."""

_F = TypeVar("_F", bound=type[Family])


def register_family(family: _F) -> _F:
    """Register a family for :class:`~tokenenv.vit.backbone.Backbone`; a decorator.

    Raises:
        UserError: another family of this name is registered already.
    """
    check_free("family", family.name, FAMILIES.get(family.name), family)
    FAMILIES[family.name] = family
    return family


def family_of(model: nn.Module) -> Family:
    """An instance, for ``model``, of the first registered family that accepts it.

    Raises:
        UserError: none accepts it; the message holds the reason of each.
    """
    reasons = []
    for family in FAMILIES.values():
        reason = family.refusal(model)
        if reason is None:
            return family(model)
        reasons.append(reason)
    name = getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__
    raise UserError(
        f"model '{name}' is not supported: {', and '.join(dict.fromkeys(reasons))}; "
        "use a model of timm's VisionTransformer family (ViT, DeiT, CLIP, DINOv2 ...), "
        "or register its family"
    )


def check_options(options: Any) -> dict[str, Any]:
    """Arguments for ``timm.create_model`` from a file, which are refused unless a family's own.

    Timm takes others that download something or read any file (``pretrained_cfg_overlay``,
    ``checkpoint_path``), or allocate without limit (``depth``).

    Args:
        options: a JSON value.

    Returns:
        The arguments, with tuples for lists.

    Raises:
        Unfit: it is no object, or a field is not what a registered family's ``OPTIONS`` allow.
    """
    kinds: dict[str, Any] = {}
    for family in FAMILIES.values():
        kinds |= family.OPTIONS
    given = kinds.keys() & options.keys() if isinstance(options, dict) else ()
    check_fields(options, {key: kinds[key] for key in given}, closed=True)
    return {key: tuple(one) if isinstance(one, list) else one for key, one in options.items()}


register_family(VisionTransformerFamily)
