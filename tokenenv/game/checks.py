"""Checks and defaults of values that rules, rewards and reducers have in common."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from typing import Any

from tokenenv.errors import UserError


def check_blocks(blocks: Sequence[int]) -> None:
    """Raise :class:`UserError` unless ``blocks`` are strictly increasing indices from 0."""
    if not all(isinstance(block, int) for block in blocks):
        raise UserError(f"blocks={_slashed(blocks)} must be whole numbers such as 3/6/9")
    if not blocks or list(blocks) != sorted(set(blocks)) or blocks[0] < 0:
        raise UserError(
            f"blocks={_slashed(blocks)} must be strictly increasing block indices from 0"
        )


def check_features(features: Sequence[str], known: Sequence[str]) -> None:
    """Raise :class:`UserError` unless ``features`` are in ``known`` and none is repeated."""
    if not features or len(set(features)) < len(features):
        raise UserError(f"features={features!r}: name at least one, each only once")
    unknown = [f for f in features if f not in known]
    if unknown:
        raise UserError(f"unknown feature '{unknown[0]}': choose from {', '.join(known)}")


def check_range(blocks: Sequence[int], depth: int) -> None:
    """Raise :class:`UserError` unless a model of ``depth`` blocks has all ``blocks``."""
    if blocks and blocks[-1] >= depth:
        raise UserError(
            f"decision block {blocks[-1]} is out of range: the model has blocks 0 to {depth - 1}"
        )


def _slashed(blocks: Sequence[int]) -> str:
    return "/".join(str(b) for b in blocks)


def check_keep(keep: float) -> None:
    """Raise :class:`UserError` unless ``keep`` is a share in (0, 1]."""
    if not 0.0 < keep <= 1.0:
        raise UserError(f"keep ratio {keep:g} is outside (0, 1]: give a share such as 0.7")


def check_threshold(threshold: float) -> float:
    """``threshold``, unchanged.

    Raises:
        UserError: it is no probability between 0 and 1.
    """
    if not 0.0 < threshold < 1.0:
        raise UserError(f"threshold={threshold:g} is no probability: give more than 0, below 1")
    return threshold


def spread_blocks(depth: int, count: int = 3) -> tuple[int, ...]:
    """``count`` decision blocks spread evenly over ``depth`` blocks: 3, 6, 9 of 12.

    Block 0 is one only if it is the only block; a model with fewer than ``count`` other blocks
    gets fewer.
    """
    count = max(1, min(count, depth - 1))
    return tuple(round(depth * (i + 1) / (count + 1)) for i in range(count))


MOST_IMAGES = 2**16
"""The largest batch: more images at once only fill the memory."""

MOST_ROUNDS = 10_000
"""The most timings of each method."""


def check_threads(threads: Any) -> int:
    """``threads`` as an int.

    Raises:
        UserError: it is no whole number from 1 on, or more than the machine has processors, for
            which the system could refuse to start them.
    """
    number, most = check_whole("threads", threads, 1), os.cpu_count() or 1
    if number > most:
        raise UserError(
            f"threads={number}: more threads than this machine's {most} processors only wait for "
            f"each other: give at most {most}"
        )
    return number


def check_whole(name: str, value: Any, least: int, below: int = 2**31) -> int:
    """``value`` as an int.

    Raises:
        UserError: it is no whole number from ``least`` to ``below - 1``.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if not least <= number < below:
        raise UserError(f"{name}={value!r} is no whole number from {least} to {below - 1}")
    return number
