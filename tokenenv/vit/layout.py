"""Where the tokens of images of different lengths lie: in few groups of equal length.

Images of about the same length form a group, padded to the longest of it, so that attention runs
once for each group. Sizes recur: libraries of matrix products build a kernel for each new size,
which takes longer than a small product itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from tokenenv.vit.kept import kept

ROWS = 2048
"""Rows that a part of a block takes at a time on a CPU, so that they stay in its caches."""

_PADDING = 24
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
            used = shape[0] * shape[1]
            return (values if len(values) == used else values[:used]).unflatten(0, shape)
        return values.index_select(0, self.row.flatten()).unflatten(0, shape)

    @property
    def whole(self) -> Portion:
        """All rows as one portion."""
        return Portion(0, self.rows, self.rows, self.groups)


def arrange(lengths: Sequence[int], device: torch.device, most: int | None = None) -> Packing:
    """Choose the groups of images of given lengths.

    Args:
        lengths: number of tokens of each image.
        device: where the tokens are.
        most: number of places that an image has now. If given, lengths and rows recur from batch to
            batch, at the price of padding; no image gets more places than that, since there is no
            agent for a place that was never a token's.
    """
    if len(lengths) == 1:
        if most is not None:
            return kept(_alone, lengths[0], min(recurring(lengths[0]), most), device)
        return evenly(1, lengths[0], device)
    need = list(lengths) if most is None else [min(-(-n // 8) * 8, most) for n in lengths]
    order = sorted(range(len(need)), key=need.__getitem__, reverse=True)
    cuts = _cuts([need[image] for image in order])
    longest = need[order[0]]
    if len(cuts) == 2 and min(lengths) == longest:
        return evenly(len(lengths), longest, device)
    if len(cuts) == 2:
        groups: tuple[Group, ...] = (Group(0, len(lengths), longest, False, None),)
        first = [image * longest for image in range(len(lengths))]
    else:
        groups, first = _sorted_groups(lengths, need, order, cuts, device)
    portions = tuple(_portions(groups, ROWS, most is not None, device))
    rows = max(portion.start + portion.rows for portion in portions)
    last = portions[-1]
    portions = (*portions[:-1], last._replace(stop=rows, rows=rows - last.start))
    place = torch.arange(longest, device=device)
    begin, number = torch.tensor([first, lengths], device=device)[..., None]
    alive = place < number
    nth = torch.minimum(place, number - 1)
    return Packing(
        tuple(lengths),
        groups,
        portions,
        begin[:, 0],
        rows,
        alive,
        even=False,
        nth=nth,
        place=_places(groups, longest, rows, device),
        row=begin + nth if groups[0].members is not None else None,
        hidden=torch.where(alive, 0.0, -torch.inf)[:, None, None],
    )


def _cuts(need: Sequence[int]) -> list[int]:
    """Where groups begin among falling lengths, and the number of lengths."""
    cuts, waste = [0], 0
    for place, length in enumerate(need):
        waste += need[cuts[-1]] - length
        if waste > _PADDING:
            cuts.append(place)
            waste = 0
    return [*cuts, len(need)]


def _alone(count: int, rows: int, device: torch.device) -> Packing:
    """The packing of a single image."""
    if rows == count:
        return _evenly(1, count, device, ROWS)
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
    return kept(_evenly, images, length, device, ROWS)


def _evenly(images: int, length: int, device: torch.device, most: int) -> Packing:
    whole = (Group(0, images, length, True, None),)
    first = torch.arange(images, device=device) * length
    portions = tuple(_portions(whole, most, False, device))
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
    inside, found = torch.arange(longest, device=device), []
    for group in groups:
        assert group.members is not None
        found.append((group.members[:, None] * longest + inside[: group.length]).flatten())
    found.append(inside[:1].expand(rows - stop))
    return torch.cat(found)


def _sorted_groups(
    lengths: Sequence[int],
    need: Sequence[int],
    order: Sequence[int],
    cuts: Sequence[int],
    device: torch.device,
) -> tuple[tuple[Group, ...], list[int]]:
    """The groups of the images in ``order``, cut at ``cuts``, and the first row of each image."""
    groups, first, start = [], [0] * len(order), 0
    sorted_images = torch.tensor(order, device=device)
    for begin, end in pairwise(cuts):
        images, longest = order[begin:end], need[order[begin]]
        for place, image in enumerate(images):
            first[image] = start + place * longest
        full = all(lengths[image] == longest for image in images)
        groups.append(Group(start, end - begin, longest, full, sorted_images[begin:end]))
        start = groups[-1].stop
    return tuple(groups), first


def _portions(
    groups: Sequence[Group], most: int, recurs: bool, device: torch.device
) -> Iterator[Portion]:
    """Portions of whole images with at most about ``most`` rows."""
    parts = []
    for group in groups:
        step = max(1, most // group.length)
        for first in range(0, group.images, step):
            parts.append(group.part(first, min(step, group.images - first), device))
    while parts:
        start, taken = parts[0].start, [parts.pop(0)]
        while parts and parts[0].stop - start <= most:
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
