"""What a transformer block does to tokens, and in which portions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterator
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenenv.vit import attention
from tokenenv.vit.tokens import Packing, Tokens


class Parts(NamedTuple):
    """What a block does to each token on its own: to ``(B, N, D)`` and ``(T, D)`` alike.

    The three functions are a :class:`~tokenenv.vit.families.Family`'s; ``compiled``: whether they
    run through ``torch.compile``.
    """

    enter: Callable[[Any, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]
    leave: Callable[[Any, Tensor, Tensor, Tensor], Tensor]
    feed: Callable[[Any, Tensor], Tensor]
    compiled: bool = False


@cache
def compiled_parts(parts: Parts, kind: tuple[Hashable, ...]) -> Parts:
    """``parts`` through ``torch.compile``, for one ``kind`` of blocks.

    Each kind has functions of its own: torch counts the graphs of a function, and compiles no more
    of them from a limit on.
    """

    def compiled(part: Any) -> Any:
        copy = FunctionType(
            part.__code__.replace(), part.__globals__, part.__name__, part.__defaults__,
            part.__closure__,
        )  # fmt: skip
        return torch.compile(copy, dynamic=True)

    return Parts(compiled(parts.enter), compiled(parts.leave), compiled(parts.feed), compiled=True)


class Wanted(NamedTuple):
    """What is asked of a block's attention beside the tokens; see :class:`Attended`."""

    queries: bool = False
    keys: bool = False
    mean_keys: bool = False
    value_norms: bool = False
    scores: bool = False


class Attended(NamedTuple):
    """What attention made of some images, all laid out as their tokens: ``(B, N, ...)``, or
    ``(T, ...)`` where they are packed.

    Attributes:
        x: ``(..., D)`` the tokens after attention and its residual.
        queries: ``(..., heads, dim)``, or None where it isn't wanted, as all below.
        keys: ``(..., heads, dim)``.
        mean_keys: ``(..., dim)`` mean of the keys over the heads.
        value_norms: ``(...)`` float32 lengths of the values, all heads together.
        scores: ``(..., heads)`` :func:`tokenenv.vit.attention.first_scores`.
    """

    x: Tensor
    queries: Tensor | None = None
    keys: Tensor | None = None
    mean_keys: Tensor | None = None
    value_norms: Tensor | None = None
    scores: Tensor | None = None


class _Images(NamedTuple):
    """All images of a batch or some: ``(b, N, D)``, or ``(t, D)`` and the length of each."""

    x: Tensor
    mask: Tensor | None
    lengths: tuple[int, ...] | None = None
    packing: Packing | None = None


def attend(
    parts: Parts, block: Any, tokens: Tokens, mask: Tensor | None, want: Wanted, drop: float
) -> Attended:
    """Attention and its residual, in portions where that is faster.

    ``mask`` as for :func:`tokenenv.vit.attention.padded`; of packed tokens only float. ``drop``:
    probability of dropping an attention weight; packed tokens are played without.
    """
    packing = tokens.packing
    if not _in_portions(parts, block, tokens):
        lengths = None if packing is None else packing.lengths
        return _attend(parts, block, _Images(tokens.x, mask, lengths, packing), want, drop)
    portions = _padded_portions if packing is None else _packed_portions
    ran = [_attend(parts, block, images, want, drop) for images in portions(tokens, mask)]
    columns: Any = zip(*ran, strict=True)
    joined: Any = (None if column[0] is None else torch.cat(column) for column in columns)
    return Attended(*joined)


def _attend(parts: Parts, block: Any, images: _Images, want: Wanted, drop: float) -> Attended:
    x, mask, lengths, packing = images
    h, q, k, v = parts.enter(block, x)
    scores = None
    if lengths is None:
        out = attention.padded(q, k, v, mask, drop)
        if want.scores:
            scores = attention.first_scores(q, k)
    elif packing is None or x.device.type == "cpu":
        out, scores = attention.one_by_one(q, k, v, lengths, mask, scores=want.scores)
    else:
        out = attention.packed(q, k, v, packing, mask)
        if want.scores:
            scores = attention.first_scores(q, k, packing)
    return Attended(
        parts.leave(block, x, h, out),
        q if want.queries else None,
        k if want.keys else None,
        mean_head(k) if want.mean_keys else None,
        v.flatten(-2).float().norm(dim=-1) if want.value_norms else None,
        scores,
    )


def feed(parts: Parts, block: Any, tokens: Tokens) -> Tensor:
    """MLP and its residual, in portions where that is faster; as :attr:`Tokens.x`."""
    if not _in_portions(parts, block, tokens):
        return parts.feed(block, tokens.x)
    rows = tokens.rows
    portions = rows.tensor_split(math.ceil(len(rows) / _ROWS))
    return torch.cat([parts.feed(block, rows) for rows in portions]).view(tokens.x.shape)


_ROWS, _NUMBERS = 2048, 2**17
"""Tokens that a block takes at once on a CPU where nothing learns; below so many numbers, all."""


def _in_portions(parts: Parts, block: Any, tokens: Tokens) -> bool:
    """Whether a block should take a portion of the tokens at a time.

    Queries, keys and values together are three times as wide as its input and the MLP's hidden
    layer four times: of a whole batch that is memory which the system hands out and clears anew in
    every block, of a portion it stays in the caches. In training stochastic depth draws for whole
    images, and a graph of the portions would keep all that memory.
    """
    rows = tokens.rows
    if parts.compiled or rows.device.type != "cpu" or block.training:
        return False
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return len(rows) > _ROWS and rows.numel() > _NUMBERS


def _padded_portions(tokens: Tokens, mask: Tensor | None) -> Iterator[_Images]:
    """About equally many images each."""
    count = min(math.ceil(len(tokens.rows) / _ROWS), len(tokens.x))
    masks = itertools.repeat(None) if mask is None else mask.tensor_split(count)
    for x, own in zip(tokens.x.tensor_split(count), masks, strict=False):
        yield _Images(x, own)


def _packed_portions(tokens: Tokens, mask: Tensor | None) -> Iterator[_Images]:
    """Whole images, until the portion has its share of the tokens."""
    assert tokens.packing is not None
    lengths, total = tokens.packing.lengths, len(tokens.x)
    share = total / math.ceil(total / _ROWS)
    first = start = end = 0
    for last, length in enumerate(lengths, 1):
        end += length
        if end - start >= share or last == len(lengths):
            own = None if mask is None else mask[first:last]
            yield _Images(tokens.x[start:end], own, lengths[first:last])
            first, start = last, end


def mean_head(values: Tensor) -> Tensor:
    """``(..., heads, dim)`` -> ``(..., dim)``: ``mean(-2)``, which takes a CPU twice as long."""
    first, *others = values.unbind(-2)
    return sum(others, first) / values.shape[-2]
