"""Layouts of kept tokens: padded to the longest image of the batch, or packed without padding."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tokenenv.vit.tokens import Packing, Tokens


def compact(tokens: Tokens) -> Tokens:
    """Cut out removed tokens; shorter images are padded to the longest of the batch.

    The kept tokens come first, in their order. The result is not ragged if all images have the
    same length. Reads the lengths back from the device.
    """
    if not (tokens.ragged and len(tokens.x)):
        return tokens
    if len(tokens.x) == 1:
        return _compact_one(tokens)
    return _compact_to(tokens, tokens.counts().tolist())


def _compact_to(tokens: Tokens, lengths: list[int]) -> Tokens:
    """:func:`compact`, given the number of kept tokens of each image."""
    shortest, longest = min(lengths), max(lengths)
    if shortest == tokens.x.shape[1]:
        return replace(tokens, ragged=False)
    order = _kept_first(tokens)
    made = reorder(tokens, order, longest)
    return replace(made, x=take(tokens.x, order[:, :longest]), ragged=shortest != longest)


def pack(tokens: Tokens) -> Tokens:
    """Cut out removed tokens, and pack the embeddings if images differ in length.

    Reads the lengths back from the device. :func:`unpack` of the result equals :func:`compact`,
    with zeros as padding.
    """
    if tokens.packing is not None or not (tokens.ragged and len(tokens.x)):
        return tokens
    if len(tokens.x) == 1:
        return _compact_one(tokens)
    lengths = tokens.counts().tolist()
    if min(lengths) == max(lengths):
        return _compact_to(tokens, lengths)
    return close_up(end_to_end(tokens), tuple(lengths))[0]


def end_to_end(tokens: Tokens) -> Tokens:
    """Padded tokens as packed ones, removed tokens included; a view, nothing is copied."""
    batch, count = tokens.alive.shape
    place = torch.arange(batch * count, device=tokens.x.device)
    return replace(tokens, x=tokens.rows, packing=Packing((count,) * batch, place))


def close_up(tokens: Tokens, lengths: tuple[int, ...]) -> tuple[Tokens, Tensor]:
    """Packed tokens without those that were removed since they were packed.

    Args:
        tokens: packed tokens, some of them no longer ``alive``.
        lengths: number of kept tokens of each image.

    Returns:
        The kept tokens in new memory, and ``(T,)`` the new row of each old row; for the row of a
        removed token it is meaningless.
    """
    assert tokens.packing is not None
    longest, device = max(lengths), tokens.x.device
    stays = tokens.alive.flatten().index_select(0, tokens.packing.place)
    kept = stays.nonzero()[:, 0]
    count = torch.tensor(lengths, device=device)
    alive = torch.arange(longest, device=device) < count[:, None]
    packing = Packing(lengths, alive.flatten().nonzero()[:, 0])
    size = tokens.size.flatten().index_select(0, tokens.packing.place.index_select(0, kept))
    rank = tokens.alive.cumsum(1) - 1
    source = rank.gather(1, tokens.source.clamp(min=0))
    closed = replace(
        tokens,
        x=tokens.x.index_select(0, kept),
        size=packing.unpack(size),
        alive=alive,
        source=torch.where(tokens.source >= 0, source, -1),
        ragged=min(lengths) != longest,
        moved=True,
        packing=packing,
    )
    return closed, stays.cumsum(0) - 1


def _compact_one(tokens: Tokens) -> Tokens:
    """:func:`compact` of a single image without reading its length, for ``torch.export``."""
    kept = tokens.alive[0].nonzero()[:, 0]
    if torch.compiler.is_compiling():  # torch 2.14 can't export attention of possibly 0 tokens
        torch._check(kept.shape[0] > 0)
    rank = (tokens.alive[0].cumsum(0) - 1)[tokens.source.clamp(min=0)]
    return replace(
        tokens,
        x=tokens.x.index_select(1, kept),
        size=tokens.size.index_select(1, kept),
        alive=tokens.alive.index_select(1, kept),
        source=torch.where(tokens.source >= 0, rank, -1),
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
    source = rank.gather(1, tokens.source.clamp(min=0))
    return replace(
        tokens,
        size=tokens.size.gather(1, front),
        alive=tokens.alive.gather(1, front),
        source=torch.where(tokens.source >= 0, source, -1),
        moved=True,
    )


def _kept_first(tokens: Tokens) -> Tensor:
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
