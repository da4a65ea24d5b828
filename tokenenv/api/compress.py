"""A model and a method compressed into one faster model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from tokenenv.api.opening import open_candidates
from tokenenv.api.what import NamedMethod, NamedWord, method_of, name_what, no_method
from tokenenv.data import Preprocessing
from tokenenv.deploy.compressed import CompressedViT
from tokenenv.deploy.compressed import compress as compress_model
from tokenenv.errors import UserError, check_keywords
from tokenenv.game.episode import Execution
from tokenenv.measure.candidate import MethodCandidate
from tokenenv.measure.opening import images_to_time, named_model
from tokenenv.measure.speed import Speed, bench, pool_size
from tokenenv.vit.families import family_of


def glance(fast: CompressedViT, batches: Sequence[int] = (1, 8)) -> list[Speed]:
    """How fast a compressed model is here, after some seconds of timing it beside the dense one.

    It sees the images of an embedded model, else random ones, on which a method may decide
    unlike on real ones; ``tokenenv bench`` takes real ones.

    Returns:
        One row per batch size.
    """
    backbone = fast.backbone
    images, _ = images_to_time(backbone, backbone.architecture, None, pool_size(max(batches)))
    candidate = MethodCandidate("compressed", fast.policy, backbone)
    return [
        bench(backbone, [candidate], images, batch=batch, rounds=3, execution=fast.execution)[1]
        for batch in batches
    ]


@check_keywords
def compress(
    model: nn.Module | str | None,
    what: Any,
    execution: Execution | None = None,
    *,
    weights: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    preprocessing: Preprocessing | None = None,
    trust: bool = False,
) -> CompressedViT:
    """Make a model and a method one module that computes only the tokens the method keeps.

    Args:
        model: a timm model that :class:`~tokenenv.Backbone` takes, which is copied and not changed;
            or its name; None: the model ``what`` was trained on, else ``digits_vit``.
        what: the method, as :func:`tokenenv.evaluate` takes it; copied.
        execution: how images of different lengths share a batch, see
            :class:`~tokenenv.game.episode.Episode`; None: the device's default.
        weights: of a model given by name, see :func:`tokenenv.evaluate`.
        device: of a model given by name, see :func:`tokenenv.evaluate`.
        dtype: of a model given by name, see :func:`tokenenv.evaluate`.
        preprocessing: of a model given by name, see :func:`tokenenv.evaluate`; kept in the folder
            that is saved.
        trust: whether to run third-party code that a saved method names, see :func:`agents.load`.

    Returns:
        The module, in ``eval`` mode.

    Raises:
        UserError: a model that is compressed already or not supported, a method for another model,
            an unknown execution.
    """
    if isinstance(model, CompressedViT):
        raise UserError("the model is compressed already: compress the timm model it was made of")
    if isinstance(model, nn.Module):
        return compress_model(
            model, method_of(what, len(family_of(model).blocks), trust), execution
        )
    named = name_what(what, trust)
    if not isinstance(named, NamedWord | NamedMethod):
        raise UserError(no_method(named))
    opened = open_candidates(
        [what], named_model(model, weights, device, dtype, preprocessing), images=False, trust=trust
    )
    (candidate,) = opened.candidates
    assert isinstance(candidate, MethodCandidate)
    return compress_model(candidate.backbone.model, candidate.method, execution)
