"""The options of an environment's ``reset``: which images to play."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from tokenenv.data import Batch, ImageSource, Stream
from tokenenv.errors import UserError

OPTIONS = ("index", "label", "file")
_OF_CHECKERS = {"options": 1}  # PettingZoo's api_test and parallel_api_test give this and no more


def chosen_batch(stream: Stream, options: dict[str, Any] | None, repeats: int = 1) -> Batch | None:
    """The images that ``options`` name; None where they name none.

    Args:
        stream: the images in the order in which they would be played.
        options: one of ``index``, a position in the source; ``label``, for which the next image of
            that class is taken, so that those before it are passed over; and ``file``, a name in
            the source. A batch of ``B`` images takes one value for all or ``B`` of them.
        repeats: how many times in a row each image is in the batch; so often each value is given.

    Returns:
        The images without their repeats.

    Raises:
        UserError: an unknown option, two of them, a value that names no image, another number of
            values than images, other values for the repeats of an image, or an image that can't be
            read.
    """
    if options is not None and not isinstance(options, Mapping):
        raise UserError(f"options={options!r:.60}: give a dict such as {{'index': 5}}, or None")
    if not options or options == _OF_CHECKERS:
        return None
    for name in options:
        if name not in OPTIONS:
            raise UserError(f"unknown option '{name}' of reset: choose from {', '.join(OPTIONS)}")
    if len(options) > 1:
        raise UserError(f"options {' and '.join(options)} both name images: give one of them")
    ((name, given),) = options.items()
    values = _one_each(name, given, stream.part_size, repeats)
    if name == "label":
        return stream.next_of([_whole(name, value) for value in values])
    source = stream.source
    if name == "file":
        index = [_place_of(value, source) for value in values]
    else:
        index = [_whole(name, value) for value in values]
        for value in index:
            if not 0 <= value < len(source):
                raise UserError(
                    f"index={value} is not in '{source.name}': choose 0 to {len(source) - 1}"
                )
    batch = source.batch(torch.tensor(index))
    if len(batch.index) < len(index):
        lost = (set(index) - set(batch.index.tolist())).pop()
        raise UserError(f"image '{source.files[lost]}' can't be read: choose another")
    return batch


def _one_each(name: str, given: Any, count: int, repeats: int) -> list[Any]:
    """``count`` values, from one for all, or from ``count * repeats`` with equal neighbours."""
    if isinstance(given, str) or np.ndim(given) == 0:
        return [given] * count
    values, whole = list(given), count * repeats
    if len(values) != whole:
        raise UserError(
            f"option '{name}' has {len(values)} values for {whole} images: give {whole}, or one"
        )
    once = values[::repeats]
    if values != [value for value in once for _ in range(repeats)]:
        raise UserError(
            f"option '{name}' has different values for the repeats of an image: give each value "
            f"repeats={repeats} times in a row"
        )
    return once


def _place_of(file: Any, source: ImageSource) -> int:
    try:
        return source.files.index(file)
    except ValueError:
        raise UserError(
            f"file={file!r} is not in '{source.name}': give a name such as '{source.files[0]}'"
        ) from None


def _whole(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise UserError(f"{name}={value!r} is not a whole number") from None
