"""Running a transformer block on tokens, in portions where that is faster."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenenv.vit import attention, layout
from tokenenv.vit.hooks import watched
from tokenenv.vit.layout import Group, Portion
from tokenenv.vit.tokens import Tokens


class Parts(NamedTuple):
    """The token-wise parts of a family's blocks, for ``(B, N, D)`` and ``(R, D)`` tokens."""

    enter: Callable[[Any, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]
    leave: Callable[[Any, Tensor, Tensor, Tensor], Tensor]
    feed: Callable[[Any, Tensor], Tensor]


class Wanted(NamedTuple):
    """What a block's attention shall return beside the tokens; see :class:`Attended`."""

    queries: bool = False
    keys: bool = False
    mean_keys: bool = False
    value_norms: bool = False
    scores: bool = False


class Attended(NamedTuple):
    """What a block's attention returns, in the layout of the tokens.

    ``...`` stands for ``(B, N)``, or for ``(R,)`` if the tokens are packed. All fields but ``x``
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


class _Bias(NamedTuple):
    """What is added to the attention scores of packed tokens.

    Attributes:
        values: ``(B, 1, 1, N)`` for the keys of each image, -inf for padding; or None.
        everywhere: whether images without padding need it, too.
    """

    values: Tensor | None
    everywhere: bool

    def of(self, group: Group) -> Tensor | None:
        """``(images, 1, 1, length)`` for the images of a group, or None."""
        if self.values is None or (group.full and not self.everywhere):
            return None
        own = self.values if group.members is None else self.values.index_select(0, group.members)
        return own[..., : group.length]


def attend(
    parts: Parts, block: Any, tokens: Tokens, bias: Tensor | None, want: Wanted, drop: float
) -> Attended:
    """Attention and its residual, in portions where that is faster.

    Args:
        parts: the family's functions.
        block: the block's module.
        tokens: the tokens before the block.
        bias: as for :func:`tokenenv.vit.attention.padded`; of packed tokens float, or None.
        want: what to return beside the tokens.
        drop: probability of dropping an attention weight; ignored for packed tokens.
    """
    small, packing = not _in_portions(parts, block, tokens), tokens.packing
    if small and packing is not None and packing.even:  # the padded layout, as rows
        x = packing.unpack(tokens.x)
        apart = _attend_padded(parts, block, x, bias, want, drop)
        rows: Any = (None if each is None else each.flatten(0, 1) for each in apart)
        return Attended(*rows)
    if packing is not None:
        portions = (packing.whole,) if small else packing.portions
        added = _Bias(packing.hidden if bias is None else bias, bias is not None)
        ran = [_attend_packed(parts, block, tokens.x, each, added, want) for each in portions]
    elif small:
        return _attend_padded(parts, block, tokens.x, bias, want, drop)
    else:
        ran = [
            _attend_padded(parts, block, x, mask, want, drop)
            for x, mask in _padded_portions(tokens, bias)
        ]
    if len(ran) == 1:
        return ran[0]
    columns: Any = zip(*ran, strict=True)
    joined: Any = (None if column[0] is None else torch.cat(column) for column in columns)
    return Attended(*joined)


def _attend_padded(
    parts: Parts, block: Any, x: Tensor, mask: Tensor | None, want: Wanted, drop: float
) -> Attended:
    h, q, k, v = parts.enter(block, x)
    out = attention.padded(q, k, v, mask, drop)
    scores = attention.first_scores(q, k) if want.scores else None
    return _attended(parts.leave(block, x, h, out), q, k, v, scores, want)


def _attend_packed(
    parts: Parts, block: Any, x: Tensor, portion: Portion, bias: _Bias, want: Wanted
) -> Attended:
    """A portion of packed tokens."""
    x = x[portion.start : portion.start + portion.rows]
    kept, used = portion.stop - portion.start, portion.groups[-1].stop
    h, q, k, v = parts.enter(block, x)
    out, scores = [], []
    for group in portion.groups:
        shape = (group.images, group.length)
        query, key, value = (t[group.start : group.stop].unflatten(0, shape) for t in (q, k, v))
        out.append(attention.padded(query, key, value, bias.of(group)).flatten(0, 1))
        if want.scores:
            scores.append(attention.first_scores(query, key).flatten(0, 1))
    if used < len(x):  # no image's rows: any finite values
        out.append(v[used:])
        scores.append(v[used:, :, 0].float())
    after = parts.leave(block, x, h, _joined(out))
    found = _attended(after, q, k, v, _joined(scores) if want.scores else None, want)
    if kept == len(x):
        return found
    cut: Any = (None if values is None else values[:kept] for values in found)
    return Attended(*cut)


def attend_prefix(parts: Parts, block: Any, tokens: Tokens, bias: Tensor | None) -> Tensor:
    """Attention and its residual, of the prefix tokens alone; arguments as for :func:`attend`.

    They read all tokens, but nothing else is computed for the others.

    Returns:
        ``(B, prefix, D)``.
    """
    packing, prefix = tokens.packing, tokens.prefix
    small = not _in_portions(parts, block, tokens)
    if packing is None or (small and packing.even):
        x = tokens.x if packing is None else packing.unpack(tokens.x)
        h, q, k, v = parts.enter(block, x)
        out = attention.padded(q[:, :prefix], k, v, bias)
        return parts.leave(block, x[:, :prefix], h[:, :prefix], out)
    added = _Bias(packing.hidden if bias is None else bias, bias is not None)
    found: list[tuple[Tensor, ...]] = []
    for portion in (packing.whole,) if small else packing.portions:
        x = tokens.x[portion.start : portion.start + portion.rows]
        h, q, k, v = parts.enter(block, x)
        for group in portion.groups:
            x_, h_, query, key, value = (
                t[group.start : group.stop].unflatten(0, (group.images, group.length))
                for t in (x, h, q, k, v)
            )
            out = attention.padded(query[:, :prefix], key, value, added.of(group))
            found.append((x_[:, :prefix], h_[:, :prefix], out))
    x, h, out = (_joined(list(column)) for column in zip(*found, strict=True))
    after = parts.leave(block, x, h, out)
    if packing.row is None:
        return after
    order = torch.cat([group.members for group in packing.groups if group.members is not None])
    return after.index_select(0, order.argsort())


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attended(
    x: Tensor, q: Tensor, k: Tensor, v: Tensor, scores: Tensor | None, want: Wanted
) -> Attended:
    return Attended(
        x,
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
    if tokens.packing is None:
        portions = rows.tensor_split(math.ceil(len(rows) / layout.ROWS))
        return torch.cat([parts.feed(block, rows) for rows in portions]).view(tokens.x.shape)
    return torch.cat(
        [
            parts.feed(block, rows[each.start : each.start + each.rows])[: each.stop - each.start]
            for each in tokens.packing.portions
        ]
    )


def through(parts: Parts, block: Any, tokens: Tokens) -> Tensor | None:
    """A block on images of equal length without mask: :func:`attend` and :func:`feed` in one.

    Nothing is read of its attention, so it takes fewer steps around the layers.

    Returns:
        The shape of ``tokens.x``; None where the block has to run in portions, or in ``train``
        mode, where attention weights are dropped.
    """
    if block.training or _in_portions(parts, block, tokens):
        return None
    x, packing = tokens.x, tokens.packing
    if packing is not None:
        x = packing.unpack(x)
    h, q, k, v = parts.enter(block, x)
    x = parts.feed(block, parts.leave(block, x, h, attention.padded(q, k, v, None)))
    return x if packing is None else x.flatten(0, 1)


_NUMBERS = 2**17
"""A batch of fewer numbers is not split on a CPU."""


def _in_portions(parts: Parts, block: Any, tokens: Tokens) -> bool:
    """Whether a block should run on a portion of the tokens at a time.

    Queries, keys and values together are three times as wide as the input, the MLP's hidden layer
    four times. For a whole batch the system allocates and clears this memory in every block; for a
    portion it stays in the caches. Not in training: stochastic depth draws per image, and the
    autograd graph would keep all that memory anyway. Nor where hooks look: they expect the batch.
    """
    x = tokens.x
    if x.device.type != "cpu" or block.training:
        return False
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    numbers = x.numel()
    if numbers <= _NUMBERS or numbers <= layout.ROWS * x.shape[-1]:
        return False
    return not watched([block])


def _padded_portions(tokens: Tokens, mask: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Portions of about the same number of images, each with its mask."""
    count = min(math.ceil(len(tokens.rows) / layout.ROWS), len(tokens.x))
    masks = itertools.repeat(None) if mask is None else mask.tensor_split(count)
    yield from zip(tokens.x.tensor_split(count), masks, strict=False)


def mean_head(values: Tensor) -> Tensor:
    """Mean over the heads, ``(..., heads, dim)`` -> ``(..., dim)``."""
    if attention.exporting():
        return values.mean(-2)
    # Faster than mean(-2).
    first, *others = values.unbind(-2)
    return sum(others, first) / values.shape[-2]
