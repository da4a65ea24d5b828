"""Layouts of kept tokens: padded to the longest image of the batch, or in groups of like length."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from tokenenv.vit.layout import arrange, evenly
from tokenenv.vit.tokens import Tokens


def compact(tokens: Tokens, left: int | None = None) -> Tokens:
    """Cut out removed tokens; shorter images are padded to the longest of the batch.

    The kept tokens come first, in their order. The result is not ragged if all images have the
    same length.

    Args:
        tokens: in the padded layout.
        left: see :func:`pack`.
    """
    if not tokens.ragged or tokens.x.shape[0] == 0:
        return tokens
    if left is not None:
        return cut(tokens, kept_first(tokens), left)
    if tokens.x.shape[0] == 1:
        return compact_one(tokens)
    if torch.compiler.is_compiling():
        return cut(tokens, kept_first(tokens), _longest(tokens), ragged=True)
    lengths = tokens.counts().tolist()
    shortest, longest = min(lengths), max(lengths)
    if shortest == tokens.x.shape[1]:
        return replace(tokens, ragged=False)
    return cut(tokens, kept_first(tokens), longest, ragged=shortest != longest)


def cut(tokens: Tokens, order: Tensor, longest: int, *, ragged: bool = False) -> Tokens:
    """The first ``longest`` tokens of each image in another order, in the padded layout.

    Args:
        tokens: ``(B, N)`` tokens.
        order: ``(B, N)`` the old place of each new one, removed tokens last.
        longest: number of tokens.
        ragged: whether some of these may be removed ones.
    """
    made = reorder(tokens, order, longest)
    if not ragged:  # known, and so not computed
        kept = torch.ones((), dtype=torch.bool, device=order.device)
        made = replace(made, alive=kept.expand(order.shape[0], longest))
    return replace(made, x=take(tokens.x, order[:, :longest]), ragged=ragged)


def _longest(tokens: Tokens) -> int:
    """Number of kept tokens of the longest image, as a symbol that ``torch.export`` follows."""
    longest: Any = tokens.counts().max().item()
    torch._check(longest > 0)
    torch._check(longest <= tokens.x.shape[1])
    return longest


def pack(tokens: Tokens, left: int | None = None) -> Tokens:
    """Cut out removed tokens; the rows of all images lie in few groups of equal length.

    :func:`unpack` of the result equals :func:`compact` for all kept tokens.

    Args:
        tokens: in the padded layout, or packed before tokens were removed.
        left: number of tokens left of every image if that is known, prefix included; else the
            lengths are read back from the device.
    """
    if not (tokens.ragged and len(tokens.alive)):
        return tokens
    packed = tokens if tokens.packing is not None else end_to_end(tokens)
    return close_up(packed, left)[0]


def end_to_end(tokens: Tokens) -> Tokens:
    """Padded tokens as packed ones, removed tokens included; a view, nothing is copied."""
    batch, count = tokens.alive.shape
    return replace(tokens, x=tokens.rows, packing=evenly(batch, count, tokens.x.device))


def close_up(
    tokens: Tokens, left: int | None = None, order: Tensor | None = None
) -> tuple[Tokens, Tensor | None]:
    """Packed tokens without those that were removed since they were packed.

    Args:
        tokens: packed tokens, some of them no longer ``alive``.
        left: see :func:`pack`.
        order: ``(B, N)`` the old place of each new one, removed tokens last; None: as they lie.

    Returns:
        The kept tokens in new memory, and ``(B, N)`` the new row of each old place, which is
        meaningless where a token was removed. If no token was removed and none moves: the tokens
        given, and None.
    """
    old = tokens.packing
    assert old is not None
    batch, count = tokens.alive.shape
    device = tokens.x.device
    kept: Tensor | None = None
    if left is not None:
        if order is None and old.even and left == count:
            return replace(tokens, ragged=False), None
        packing = evenly(batch, left, device)
    else:
        # Of one image the kept tokens tell their number.
        kept = tokens.alive.flatten().nonzero()[:, 0] if batch == 1 and order is None else None
        lengths = tokens.counts().tolist() if kept is None else [len(kept)]
        if order is None and sum(lengths) == sum(old.lengths):
            return replace(tokens, ragged=not old.even), None
        half = device.type == "cpu" and tokens.x.dtype in (torch.bfloat16, torch.float16)
        packing = arrange(lengths, device, count if half else None)
    waits = device.type == "cpu" and not torch.compiler.is_compiling()
    if order is None and (left is None or waits):
        kept = tokens.alive.flatten().nonzero()[:, 0] if kept is None else kept
        if packing.nth is not None:
            before = torch.tensor([0, *accumulate(packing.lengths[:-1])], device=device)
            kept = kept.index_select(0, (packing.nth + before[:, None]).flatten())
        rank = tokens.alive.cumsum(1) - 1
    else:
        order = kept_first(tokens) if order is None else order
        front = order[:, : packing.longest] if packing.nth is None else order.gather(1, packing.nth)
        kept = (front + torch.arange(batch, device=device)[:, None] * count).flatten()
        rank = inverse(order)
    rows = kept if packing.place is None else kept.index_select(0, packing.place)
    if old.row is not None:
        rows = old.row.flatten().index_select(0, rows)
    shape = (batch, packing.longest)
    alive, size = packing.alive, tokens.size
    if tokens.merged:
        size = size.flatten().index_select(0, kept).view(shape)
        size = size if packing.even else size * alive
    else:
        size = alive.to(size.dtype)
    closed = replace(
        tokens,
        x=tokens.x.index_select(0, rows),
        size=size,
        alive=alive,
        source=_followed(tokens.source, rank),
        ragged=not packing.even,
        moved=True,
        packing=packing,
    )
    return closed, rank + packing.first[:, None]


def _followed(source: Tensor | None, place: Tensor) -> Tensor | None:
    """``source`` after each token went from its index to ``place (B, N)``; pruned stays -1."""
    if source is None:
        return None
    return torch.where(source >= 0, place.gather(1, source.clamp(min=0)), -1)


def compact_one(tokens: Tokens) -> Tokens:
    """:func:`compact` of a single image without reading its length, for ``torch.export``."""
    kept = tokens.alive[0].nonzero()[:, 0]
    if torch.compiler.is_compiling():  # torch 2.14 can't export attention of possibly 0 tokens
        torch._check(kept.shape[0] > 0)
    rank = tokens.alive.cumsum(1) - 1
    return replace(
        tokens,
        x=tokens.x.index_select(1, kept),
        size=tokens.size.index_select(1, kept),
        alive=tokens.alive.index_select(1, kept),
        source=_followed(tokens.source, rank),
        ragged=False,
        moved=True,
    )


def unpack(tokens: Tokens) -> Tokens:
    """The tokens in the padded layout."""
    if tokens.packing is None:
        return tokens
    return replace(tokens, x=tokens.packing.unpack(tokens.x), packing=None)


def reorder(tokens: Tokens, order: Tensor, longest: int) -> Tokens:
    """All fields but ``x`` in another order, cut to ``longest`` tokens per image.

    Args:
        tokens: ``(B, N)`` tokens.
        order: ``(B, N)`` permutation: the old position of each new one.
        longest: tokens to keep of each row.
    """
    front, rank = order[:, :longest], inverse(order)
    return replace(
        tokens,
        size=tokens.size.gather(1, front),
        alive=tokens.alive.gather(1, front),
        source=_followed(tokens.source, rank),
        moved=True,
    )


def kept_first(tokens: Tokens) -> Tensor:
    """``(B, N)`` positions of the kept tokens in their order, then of the removed ones."""
    return torch.sort((~tokens.alive).to(torch.uint8), dim=1, stable=True).indices


def inverse(order: Tensor) -> Tensor:
    """The inverse of each row's permutation: ``(B, N)`` positions -> ``(B, N)`` ranks."""
    ranks = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, ranks)


def take(values: Tensor, index: Tensor) -> Tensor:
    """Select rows: values ``(B, N, D)``, indices ``(B, A)`` into N -> ``(B, A, D)``.

    On a CPU several times faster than an expanded ``gather``.
    """
    batch, count = values.shape[:2]
    first = torch.arange(batch, device=index.device) * count
    row = (index + first[:, None]).flatten()
    return values.flatten(0, 1).index_select(0, row).view(*index.shape, values.shape[-1])
