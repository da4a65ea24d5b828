"""Where the tokens of images of different lengths lie: in few groups of equal length.

Images of about the same length form a group, padded to the longest of it, so that attention runs
once for each group. Sizes recur: libraries of matrix products build a kernel for each new size,
which takes longer than a small product itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ROWS = 2048
"""Rows that a part of a block takes at a time on a CPU, so that they stay in its caches."""

_PADDING = 16
"""Rows of padding that cost about as much as the attention of one more group."""


class Group(NamedTuple):
    """Images whose tokens lie one after another, with the same number of rows each.

    Attributes:
        start: its first row.
        images: number of images.
        length: rows of each image, padding included.
        full: whether no image has padding.
        members: ``(images,)`` the images' places in the batch; None: the whole batch in its order.
    """

    start: int
    images: int
    length: int
    full: bool
    members: Tensor | None

    @property
    def stop(self) -> int:
        """The row after its last."""
        return self.start + self.images * self.length

    def part(self, first: int, images: int, device: torch.device) -> Group:
        """Some of its images, from the one at ``first`` on."""
        if images == self.images:
            return self
        if self.members is None:
            index = torch.arange(first, first + images, device=device)
        else:
            index = self.members[first : first + images]
        return Group(self.start + first * self.length, images, self.length, self.full, index)


class Portion(NamedTuple):
    """Rows that run together through a block.

    Attributes:
        start: the first row.
        stop: the row after the last.
        rows: number of rows to compute from ``start`` on, at least ``stop - start``: a size that
            recurs. Those beyond ``stop`` are computed for nothing.
        groups: the images in it; their ``start`` counts from that of the portion. The last
            portion's rows may go on after them.
    """

    start: int
    stop: int
    rows: int
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Packing:
    """How the tokens of ``B`` images lie in rows ``(R, ...)``; :func:`arrange` makes one.

    The padded layout is ``(B, N, ...)`` with N the length of the longest group. A padding row holds
    a copy of some token: it is finite, and hidden from attention.

    Attributes:
        lengths: number of kept tokens of each image, on the host.
        groups: the longest images first.
        portions: the rows in portions of whole images and about :data:`ROWS` rows.
        first: ``(B,)`` row of each image's first token.
        rows: R, padding included.
        alive: ``(B, N)`` bool, which places of the padded layout hold a token.
        even: whether all images have N tokens.
        nth: ``(B, N)`` which of its image's tokens lies at each place, past its end the last; None
            if ``even``.
        place: ``(R,)`` place of each row in the padded layout, an index into ``B N``; None if rows
            and places are the same.
        row: ``(B, N)`` the row of each place, past an image's end its last; None if the groups keep
            the images' order, and so the padded layout is a view of the rows.
        hidden: ``(B, 1, 1, N)`` float32 0 for tokens and -inf for padding; None if ``even``.
    """

    lengths: tuple[int, ...]
    groups: tuple[Group, ...]
    portions: tuple[Portion, ...]
    first: Tensor
    rows: int
    alive: Tensor
    even: bool = True
    nth: Tensor | None = None
    place: Tensor | None = None
    row: Tensor | None = None
    hidden: Tensor | None = None

    @property
    def longest(self) -> int:
        """N of the padded layout."""
        return self.groups[0].length

    def unpack(self, values: Tensor) -> Tensor:
        """``(R, ...)`` -> ``(B, N, ...)``; a view where possible."""
        shape = (len(self.lengths), self.longest)
        if self.row is None:
            return values[: shape[0] * shape[1]].unflatten(0, shape)
        return values.index_select(0, self.row.flatten()).unflatten(0, shape)

    @property
    def whole(self) -> Portion:
        """All rows as one portion."""
        return Portion(0, self.rows, self.rows, self.groups)


def arrange(lengths: Sequence[int], device: torch.device, recurs: bool = False) -> Packing:
    """Choose the groups of images of given lengths.

    Args:
        lengths: number of tokens of each image.
        device: where the tokens are.
        recurs: whether lengths and rows shall recur from batch to batch, at the price of padding.
    """
    if len(lengths) == 1:
        return _alone(lengths[0], recurring(lengths[0]) if recurs else lengths[0], device)
    count = np.asarray(lengths, dtype=np.int64)
    need = -(-count // 8) * 8 if recurs else count
    sizes, members = np.unique(need, return_counts=True)
    tops: list[int] = []  # the lengths of the groups, falling
    waste = 0
    for size, number in zip(sizes[::-1].tolist(), members[::-1].tolist(), strict=True):
        waste += (tops[-1] - size) * number if tops else 0
        if not tops or waste > _PADDING:
            tops.append(size)
            waste = 0
    if len(tops) == 1 and count.min() == tops[0]:
        return evenly(len(count), tops[0], device)
    if len(tops) == 1:
        first = np.arange(len(count)) * tops[0]
        groups: tuple[Group, ...] = (Group(0, len(count), tops[0], False, None),)
    else:
        groups, first = _sorted_groups(count, tops, device)
    portions = tuple(_portions(groups, recurs, device))
    rows = max(portion.start + portion.rows for portion in portions)
    last = portions[-1]
    portions = (*portions[:-1], last._replace(stop=rows, rows=rows - last.start))
    place = torch.arange(tops[0], device=device)
    begin, number = torch.from_numpy(np.stack([first, count])).to(device)[..., None]
    alive = place < number
    nth = torch.minimum(place, number - 1)
    return Packing(
        tuple(count.tolist()),
        groups,
        portions,
        begin[:, 0],
        rows,
        alive,
        even=False,
        nth=nth,
        place=_places(groups, tops[0], rows, device),
        row=begin + nth if groups[0].members is not None else None,
        hidden=torch.where(alive, 0.0, -torch.inf)[:, None, None],
    )


def _alone(count: int, rows: int, device: torch.device) -> Packing:
    """The packing of a single image."""
    if rows == count:
        return evenly(1, count, device)
    whole = (Group(0, 1, rows, False, None),)
    place = torch.arange(rows, device=device)[None]
    alive = place < count
    return Packing(
        (count,),
        whole,
        (Portion(0, rows, rows, whole),),
        place[0, :1],
        rows,
        alive,
        even=False,
        nth=place.clamp(max=count - 1),
        hidden=torch.where(alive, 0.0, -torch.inf)[:, None, None],
    )


def evenly(images: int, length: int, device: torch.device) -> Packing:
    """The packing of images of equal length: their padded layout, as rows."""
    whole = (Group(0, images, length, True, None),)
    first = torch.arange(images, device=device) * length
    portions = tuple(_portions(whole, False, device))
    alive = torch.ones((), dtype=torch.bool, device=device).expand(images, length)
    return Packing((length,) * images, whole, portions, first, images * length, alive)


def _places(
    groups: Sequence[Group], longest: int, rows: int, device: torch.device
) -> Tensor | None:
    """See :attr:`Packing.place`; a row beyond all images has place 0."""
    stop = groups[-1].stop
    if groups[0].members is None:
        if rows == stop:
            return None
        return torch.nn.functional.pad(torch.arange(stop, device=device), (0, rows - stop))
    place = torch.zeros(rows, dtype=torch.int64, device=device)
    for group in groups:
        assert group.members is not None
        own = group.members[:, None] * longest + torch.arange(group.length, device=device)
        place[group.start : group.stop] = own.flatten()
    return place


def _sorted_groups(
    count: NDArray[np.int64], tops: list[int], device: torch.device
) -> tuple[tuple[Group, ...], NDArray[np.int64]]:
    """The groups of the lengths ``tops``, falling, and the first row of each image."""
    groups: list[Group] = []
    first, start = np.zeros_like(count), 0
    for top, below in zip(tops, [*tops[1:], 0], strict=True):
        index = np.flatnonzero((count <= top) & (count > below))
        first[index] = start + np.arange(len(index)) * top
        full = bool((count[index] == top).all())
        groups.append(Group(start, len(index), top, full, torch.from_numpy(index).to(device)))
        start = groups[-1].stop
    return tuple(groups), first


def _portions(groups: Sequence[Group], recurs: bool, device: torch.device) -> Iterator[Portion]:
    """Portions of whole images with at most about :data:`ROWS` rows."""
    parts = []
    for group in groups:
        step = max(1, ROWS // group.length)
        for first in range(0, group.images, step):
            parts.append(group.part(first, min(step, group.images - first), device))
    while parts:
        start, taken = parts[0].start, [parts.pop(0)]
        while parts and parts[0].stop - start <= ROWS:
            taken.append(parts.pop(0))
        stop = taken[-1].stop
        moved = tuple(part._replace(start=part.start - start) for part in taken)
        rows = recurring(stop - start) if recurs else stop - start
        yield Portion(start, stop, rows, moved)


def recurring(rows: int) -> int:
    """The next of a few sizes, at most about a tenth above ``rows``."""
    for most, step in ((128, 8), (512, 16), (1024, 32)):
        if rows <= most:
            return -(-rows // step) * step
    return -(-rows // 64) * 64
