"""Map the names of a data set's classes to the outputs of a model's head."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from tokenenv.errors import UserError

if TYPE_CHECKING:
    from timm.data import ImageNetInfo

_WNID = re.compile(r"n\d{8}")


def head_outputs(model: nn.Module) -> int:
    """The number of outputs of the model's head (its ``num_classes``).

    Raises:
        UserError: the model has no classification head.
    """
    outputs = getattr(model, "num_classes", 0)
    if not isinstance(outputs, int) or outputs < 1:
        raise UserError(
            f"model '{type(model).__name__}' has num_classes={outputs!r} and classifies nothing; "
            "create it with num_classes set to the number of classes"
        )
    return outputs


def map_classes(names: Sequence[str | Sequence[str]], model: nn.Module, owner: str) -> list[int]:
    """The head output each class belongs to.

    The first of these rules that fits is used: WordNet ids (``n01440764``) for an ImageNet head;
    whole numbers below the number of outputs; the model's own label names, or ImageNet's; and, if
    there are as many classes as outputs, their order. Names are compared without case, and ``_``
    is a space. The order is that of the names as they are given, or timm's natural order (``a2``
    before ``a10``, without case) if timm's training script trained the model.

    Args:
        names: one name, or several synonyms, for each class, in the data set's own order.
        model: a classifier whose ``num_classes`` is the number of outputs.
        owner: the data set's name in an error message.

    Returns:
        One index in ``[0, num_classes)`` for each class.

    Raises:
        UserError: no rule fits, the head has no output for a WordNet id, or two classes belong to
            one output.
    """
    outputs = head_outputs(model)
    synonyms = [[name] if isinstance(name, str) else list(name) for name in names]
    first = [group[0] for group in synonyms]
    wnids = all(_WNID.fullmatch(name) for name in first)

    if wnids and (info := _imagenet(outputs)):
        rank = {wnid: index for index, wnid in enumerate(info.label_names())}
        for name in first:
            if name not in rank:
                raise UserError(
                    f"{owner}: class '{name}' is not among the {outputs} ImageNet classes of the "
                    "head; remove its folder or use a model trained on it"
                )
        return [rank[name] for name in first]

    if all(_is_output(name, outputs) for name in first):
        return _each_its_own([int(name) for name in first], first, owner)

    known = _known_names(model, outputs)
    matches = [{known[key] for key in map(_plain, group) if key in known} for group in synonyms]
    if all(len(match) == 1 for match in matches):
        return _each_its_own([match.pop() for match in matches], first, owner)

    if len(names) == outputs:
        return _timms_order(first) if _trained_by_timm(model) else list(range(outputs))

    unknown = [name for name, match in zip(first, matches, strict=True) if len(match) != 1]
    example = next((name for name in unknown if not _is_output(name, outputs)), unknown[0])
    raise UserError(
        f"{owner} has {len(names)} classes and the model's head {outputs} outputs, and class "
        f"'{example}' is no label of the model; name the classes by WordNet id, output index or "
        "label, or use a model trained on these classes"
    )


def _each_its_own(outputs: list[int], names: Sequence[str], owner: str) -> list[int]:
    """``outputs``, which are refused if two classes have the same one."""
    before: dict[int, str] = {}
    for name, output in zip(names, outputs, strict=True):
        if output in before:
            raise UserError(
                f"{owner}: classes '{before[output]}' and '{name}' are both output {output} of "
                "the model: put their images into one folder, or rename one"
            )
        before[output] = name
    return outputs


def name_outputs(model: nn.Module, names: Sequence[str]) -> None:
    """Give a timm model the names of its outputs, in their order.

    Raises:
        UserError: there is not one name, different from the others, for each output.
    """
    outputs, told = head_outputs(model), cast(Any, model)
    if len(names) != outputs or len(set(names)) != outputs or not all(names):
        raise UserError(
            f"{len(names)} class names ({len(set(names))} different) for a head of {outputs} "
            "outputs: give one for each, in their order"
        )
    told.pretrained_cfg = {**(getattr(told, "pretrained_cfg", None) or {}), "label_names": names}


def output_names(model: nn.Module) -> list[str] | None:
    """The short name of each output, from the model or else from ImageNet; None if unknown."""
    names = [_short(group) for group in _names_of_outputs(model, head_outputs(model))]
    return names or None


def own_names(model: nn.Module) -> bool:
    """Whether :func:`output_names` are the model's own."""
    cfg = getattr(model, "pretrained_cfg", None)
    return bool(isinstance(cfg, Mapping) and cfg.get("label_names"))


TIMMS_ORDER = "classes_in_timms_order"
"""Key of a model's configuration that says that timm's training script numbered its classes."""


def _trained_by_timm(model: nn.Module) -> bool:
    cfg = getattr(model, "pretrained_cfg", None)
    return bool(isinstance(cfg, Mapping) and cfg.get(TIMMS_ORDER))


def _timms_order(names: Sequence[str]) -> list[int]:
    from timm.utils.misc import natural_key

    rank = {name: place for place, name in enumerate(sorted(names, key=natural_key))}
    return [rank[name] for name in names]


def class_names(model: nn.Module) -> Callable[[int], str]:
    """A function that maps a head output to its short name for pictures.

    If no name is known, it returns the index as text.

    Raises:
        UserError: the model has no classification head.
    """
    names = output_names(model) or []
    return lambda index: names[index] if index < len(names) else str(index)


def _short(synonyms: Sequence[str]) -> str:
    """``"tench"`` of ``["n01440764", "tench, Tinca tinca"]``."""
    words = [name for name in synonyms if not _WNID.fullmatch(name)]
    return (words or synonyms)[0].split(",")[0]


def _is_output(name: str, outputs: int) -> bool:
    return name.isascii() and name.isdigit() and int(name) < outputs


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


def _imagenet(outputs: int) -> ImageNetInfo | None:
    """Names in timm of the ImageNet subset with ``outputs`` classes; None if there is none."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": outputs})
    return ImageNetInfo(subset) if subset else None


def _known_names(model: nn.Module, outputs: int) -> dict[str, int]:
    """The names that belong to one output only, unlike ImageNet's "crane", bird and machine."""
    meanings: dict[str, set[int]] = {}
    for index, names in enumerate(_names_of_outputs(model, outputs)):
        for name in names:
            meanings.setdefault(_plain(name), set()).add(index)
    return {name: found.pop() for name, found in meanings.items() if len(found) == 1}


def _names_of_outputs(model: nn.Module, outputs: int) -> Iterable[Sequence[str]]:
    """The names of each output, from the model or else from ImageNet; empty if neither has any."""
    cfg: Any = getattr(model, "pretrained_cfg", None)
    own = cfg.get("label_names") if isinstance(cfg, Mapping) else None
    if own and len(own) == outputs:
        descriptions = cfg.get("label_descriptions") or {}
        return [[name, descriptions.get(name, name)] for name in own]
    info = _imagenet(outputs)
    if info is None:
        return []
    described = zip(info.label_descriptions(), info.label_descriptions(detailed=True), strict=True)
    return [[lemmas, detail, *lemmas.split(", ")] for lemmas, detail in described]
