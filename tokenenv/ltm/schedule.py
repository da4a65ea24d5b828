"""The number of tokens after each LTM block, and the positions of merged tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tokenenv.errors import UserError

Grid = tuple[int, int]
"""Rows and columns of tokens. A mere sequence of N tokens is the grid ``(1, N)``."""

_NEAR = 0.02  # tokens: tolerance of a window's side for a rounded ratio such as 0.51


def check_ratio(ratio: float) -> float:
    """Check that a ratio is in (0, 1].

    Raises:
        UserError: it is not.
    """
    if not 0 < ratio <= 1:
        raise UserError(
            f"ratio={ratio}: the share of the tokens left after the last block; give a number "
            "above 0, and at most 1 (nothing merges)"
        )
    return float(ratio)


def shares(ratio: float, depth: int, blocks: Sequence[int] | None = None) -> list[float]:
    """Share of a stack's tokens after each of its ``depth`` blocks.

    The paper gives no schedule. This one removes the same share in each of the ``blocks`` that
    merge, ``ratio ** (k / K)`` being left after the k-th of K. ``blocks`` None: all blocks merge;
    indices that the stack does not have are ignored.
    """
    merging = range(depth) if blocks is None else sorted(b for b in set(blocks) if b < depth)
    if not len(merging):
        return [1.0] * depth
    return [ratio ** (sum(b <= i for b in merging) / len(merging)) for i in range(depth)]


def even(grid: Grid, share: float) -> Grid:
    """The grid with about ``share`` of the tokens, reduced evenly in rows and columns."""
    side = math.sqrt(share)
    return max(1, round(grid[0] * side)), max(1, round(grid[1] * side))


def flat(grid: Grid, share: float) -> Grid:
    """The sequence of ``round(N * share)`` tokens."""
    return 1, max(1, round(grid[0] * grid[1] * share))


def check_window(window: Grid, ratio: float) -> None:
    """Check that an even grid inside a window has the share ``ratio`` of its tokens.

    Args:
        window: rows and columns of the window.
        ratio: share of tokens left after the last block of each stage.

    Raises:
        UserError: a side times the root of ``ratio`` is not a whole number (to 0.02); the message
            lists the possible ratios.
    """
    sides = [side * math.sqrt(ratio) for side in window]
    if all(round(side) >= 1 and abs(side - round(side)) <= _NEAR for side in sides):
        return
    rows, columns = window
    step = math.gcd(rows, columns)
    known = ", ".join(
        f"{(k / step) ** 2:.3g} ({rows * k // step}x{columns * k // step})"
        for k in range(step, 0, -1)
    )
    raise UserError(
        f"ratio={ratio} does not divide the {rows}x{columns} windows evenly: choose from {known}"
    )


def centres(grid: Grid, smaller: Grid, device: torch.device) -> Tensor:
    """``(P,)`` int64 indices of the tokens of ``grid`` nearest to those of a smaller even grid.

    Args:
        grid: rows and columns, N tokens in row-major order.
        smaller: rows and columns of the P merged tokens; no side is longer than in ``grid``.
        device: device of the result.
    """
    rows, columns = (
        ((torch.arange(few, device=device) * 2 + 1) * many).div(2 * few, rounding_mode="floor")
        for many, few in zip(grid, smaller, strict=True)
    )
    return (rows[:, None] * grid[1] + columns).flatten()


def closeness(grid: Grid, smaller: Grid, device: torch.device) -> Tensor:
    """``(N, P)`` float32 negative squared distances between tokens and merged tokens.

    Both grids are spread evenly over the same square; the unit is a step of the smaller grid.
    """
    squared = []
    for many, few in zip(grid, smaller, strict=True):
        places = (torch.arange(many, device=device) + 0.5) * (few / many)
        squared.append((places[:, None] - (torch.arange(few, device=device) + 0.5)).square())
    rows, columns = squared
    distance = rows[:, None, :, None] + columns[None, :, None, :]
    return -distance.flatten(2).flatten(0, 1)
