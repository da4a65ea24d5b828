"""Opens the dense model and the candidates that a user named."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from agents.training import Run
from tokenenv.api.what import MadeOf, Named, check_same_model, name_what
from tokenenv.errors import UserError
from tokenenv.measure.candidate import Candidate
from tokenenv.measure.opening import Model
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.dense import Dense
from tokenenv.vit.load import EMBEDDED


@dataclass(frozen=True)
class Opened:
    """An opened dense model and candidates, ready to evaluate and to time.

    Attributes:
        model: name, weights, device and precision of the dense model.
        dense: the dense model; a :class:`~tokenenv.Backbone` unless all candidates are models of
            their own.
        candidates: in the order in which they were named.
    """

    model: Model
    dense: Dense
    candidates: tuple[Candidate, ...]


def open_candidates(
    whats: Sequence[Any],
    model: Model,
    *,
    data: str | None = None,
    images: bool = True,
    trust: bool = False,
) -> Opened:
    """Open everything that was named, the dense model first.

    If the user named no ``model``, it is the model that the first of ``whats`` was trained on, as
    it was before any fine-tuning; methods without training are skipped in that search. All of
    ``whats`` are parsed, and checked against the model as far as it is known, before weights are
    read.

    Args:
        whats: see :func:`~tokenenv.api.what.name_what`.
        model: the dense model that the user named, or a default.
        data: the images that the user named; None: those of the embedded model.
        images: whether images are needed.
        trust: whether to run third-party code that a file names.

    Raises:
        UserError: one of ``whats`` can't be parsed or loaded, or doesn't fit the model.
    """
    named = _distinct([name_what(what, trust) for what in whats])
    known = [each.made_of() for each in named]
    model = _prepared(_named_model(model, named, known), named, known)
    whole = all(each.whole for each in named)
    outline = None if whole else model.outline()
    if whole or outline is not None:
        _read(named, model, 0 if outline is None else outline.depth)
    if outline is not None:
        for each in named:
            each.check(model, outline)
    dense = _open_dense(model, known, data, images, whole)
    if not whole and outline is None and isinstance(dense, Backbone):
        _read(named, model, dense.depth)
    return Opened(model, dense, tuple(each.candidate(dense, model) for each in named))


def _read(named: Sequence[Named], model: Model, depth: int) -> None:
    for each in named:
        each.read(model.name, depth)


def each_once(whats: Iterable[Any]) -> list[Any]:
    """Words and objects in the order given, without those that were given before.

    A run and its folder, as a path or as a word, are the same.
    """
    once: dict[str | int, Any] = {}
    for what in whats:
        place = what.folder if isinstance(what, Run) else what
        word = os.fspath(place) if isinstance(place, str | os.PathLike) else id(what)
        once.setdefault(word, what)
    return list(once.values())


def _distinct(named: list[Named]) -> list[Named]:
    """The same, with a number behind names that occur more than once."""
    seen: Counter[str] = Counter()
    for each in named:
        seen[each.what] += 1
        if seen[each.what] > 1:
            each.what = f"{each.what} ({seen[each.what]})"
    return named


def _named_model(model: Model, named: Sequence[Named], known: Sequence[MadeOf]) -> Model:
    """The dense model, completed by the name and weights that the candidates know."""
    tuned = [(each.what, made) for each, made in zip(named, known, strict=True) if made.tuned]
    for what, made in tuned:
        check_same_model(what, made, model.name if model.named else tuned[0][1].model)
    if model.named:
        return model
    first = next((made for made in known if made.model), MadeOf())
    made = tuned[0][1] if tuned else first
    return replace(
        model,
        name=made.model or EMBEDDED,
        weights=model.weights or made.weights,
        named=made.model is not None,
    )


def _prepared(model: Model, named: Sequence[Named], known: Sequence[MadeOf]) -> Model:
    """The dense model with the preprocessing that what was made of it has, where none was given."""
    own, name = model.preprocessing, model.name.split(".")[0]
    kept = {
        each.what: own.over(made.preprocessing)
        for each, made in zip(named, known, strict=True)
        if made.preprocessing and made.model and made.model.split(".")[0] == name
    }
    first, *others = dict.fromkeys(kept.values()) or [own]
    if others:
        whats = {preprocessing: what for what, preprocessing in kept.items()}
        raise UserError(
            f"'{whats[first]}' and '{whats[others[0]]}' were made with different preprocessing "
            f"({first}; {others[0]}): name them apart, or give --mean, --std, --crop-pct, "
            "--interpolation and --image-size"
        )
    return replace(model, preprocessing=first)


def _open_dense(
    model: Model, known: Sequence[MadeOf], data: str | None, images: bool, whole: bool
) -> Dense:
    """Open the dense model, or the fine-tuned one without reduction if only that can be opened."""
    try:
        opened = model.open_dense if whole else model.open_backbone
        return opened(data, images=images)
    except UserError as error:
        tuned = {made.tuned for made in known}
        if len(tuned) != 1 or None in tuned:
            raise
        found = replace(model, weights=tuned.pop()).open_backbone(data, images=images)
        print(f"the model before fine-tuning can't be opened ({error})")
        print("so 'dense' is the fine-tuned model with all its tokens")
        return found
