"""Running a transformer block on tokens, in portions where that is faster."""

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
    """The token-wise parts of a block, for ``(B, N, D)`` and ``(T, D)`` tokens.

    ``enter``, ``leave`` and ``feed`` are those of a :class:`~tokenenv.vit.families.Family`;
    ``compiled`` says whether they were compiled by ``torch.compile``.
    """

    enter: Callable[[Any, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]
    leave: Callable[[Any, Tensor, Tensor, Tensor], Tensor]
    feed: Callable[[Any, Tensor], Tensor]
    compiled: bool = False


@cache
def compiled_parts(parts: Parts, kind: tuple[Hashable, ...]) -> Parts:
    """``parts`` compiled by ``torch.compile``, for one ``kind`` of blocks.

    Each kind gets its own copies of the functions, because torch limits the number of graphs that
    it compiles per function.
    """

    def compiled(part: Any) -> Any:
        copy = FunctionType(
            part.__code__.replace(), part.__globals__, part.__name__, part.__defaults__,
            part.__closure__,
        )  # fmt: skip
        return torch.compile(copy, dynamic=True)

    return Parts(compiled(parts.enter), compiled(parts.leave), compiled(parts.feed), compiled=True)


class Wanted(NamedTuple):
    """What a block's attention shall return beside the tokens; see :class:`Attended`."""

    queries: bool = False
    keys: bool = False
    mean_keys: bool = False
    value_norms: bool = False
    scores: bool = False


class Attended(NamedTuple):
    """What a block's attention returns, in the layout of the tokens.

    ``...`` stands for ``(B, N)``, or for ``(T,)`` if the tokens are packed. All fields but ``x``
    are None unless wanted.

    Attributes:
        x: ``(..., D)`` the tokens after attention and its residual.
        queries: ``(..., heads, dim)``.
        keys: ``(..., heads, dim)``.
        mean_keys: ``(..., dim)`` mean of the keys over the heads.
        value_norms: ``(...)`` float32 norms of the values, all heads together.
        scores: ``(..., heads)`` :func:`tokenenv.vit.attention.first_scores`.
    """

    x: Tensor
    queries: Tensor | None = None
    keys: Tensor | None = None
    mean_keys: Tensor | None = None
    value_norms: Tensor | None = None
    scores: Tensor | None = None


class _Images(NamedTuple):
    """Some images of a batch: ``(b, N, D)``, or packed ``(t, D)`` with the length of each."""

    x: Tensor
    mask: Tensor | None
    lengths: tuple[int, ...] | None = None
    packing: Packing | None = None


def attend(
    parts: Parts, block: Any, tokens: Tokens, mask: Tensor | None, want: Wanted, drop: float
) -> Attended:
    """Attention and its residual, in portions where that is faster.

    Args:
        parts: the family's functions.
        block: the block's module.
        tokens: the tokens before the block.
        mask: as for :func:`tokenenv.vit.attention.padded`; for packed tokens only float.
        want: what to return beside the tokens.
        drop: probability of dropping an attention weight; ignored for packed tokens.
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
    """MLP and its residual, in portions where that is faster; the shape of ``tokens.x``."""
    if not _in_portions(parts, block, tokens):
        return parts.feed(block, tokens.x)
    rows = tokens.rows
    portions = rows.tensor_split(math.ceil(len(rows) / _ROWS))
    return torch.cat([parts.feed(block, rows) for rows in portions]).view(tokens.x.shape)


_ROWS, _NUMBERS = 2048, 2**17
"""Tokens per portion on a CPU in inference; a batch of fewer numbers is not split."""


def _in_portions(parts: Parts, block: Any, tokens: Tokens) -> bool:
    """Whether a block should run on a portion of the tokens at a time.

    Queries, keys and values together are three times as wide as the input, the MLP's hidden layer
    four times. For a whole batch the system allocates and clears this memory in every block; for a
    portion it stays in the caches. Not in training: stochastic depth draws per image, and the
    autograd graph would keep all that memory anyway.
    """
    rows = tokens.rows
    if parts.compiled or rows.device.type != "cpu" or block.training:
        return False
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return len(rows) > _ROWS and rows.numel() > _NUMBERS


def _padded_portions(tokens: Tokens, mask: Tensor | None) -> Iterator[_Images]:
    """Portions of about the same number of images."""
    count = min(math.ceil(len(tokens.rows) / _ROWS), len(tokens.x))
    masks = itertools.repeat(None) if mask is None else mask.tensor_split(count)
    for x, own in zip(tokens.x.tensor_split(count), masks, strict=False):
        yield _Images(x, own)


def _packed_portions(tokens: Tokens, mask: Tensor | None) -> Iterator[_Images]:
    """Portions of whole images with about the same number of tokens."""
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
    """Mean over the heads, ``(..., heads, dim)`` -> ``(..., dim)``; faster than ``mean(-2)``."""
    first, *others = values.unbind(-2)
    return sum(others, first) / values.shape[-2]
