"""Laying out the living tokens of a batch: compacted to the longest image, or packed end to end."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tokenenv.vit.tokens import Packing, Tokens


def compact(tokens: Tokens) -> Tokens:
    """Move the living tokens to the front and cut to the longest image of the batch.

    This is what frees memory and time. It reads the lengths back from the device. The order of
    the living tokens is kept; the result is not ragged if all images are equally long.
    """
    if not (tokens.ragged and len(tokens.x)):
        return tokens
    if len(tokens.x) == 1:
        return _compact_one(tokens)
    return _compact_to(tokens, tokens.counts().tolist())


def _compact_to(tokens: Tokens, lengths: list[int]) -> Tokens:
    """:func:`compact` with the numbers of living tokens known."""
    shortest, longest = min(lengths), max(lengths)
    if shortest == tokens.x.shape[1]:
        return replace(tokens, ragged=False)
    order = _living_first(tokens)
    made = reorder(tokens, order, longest)
    return replace(made, x=take(tokens.x, order[:, :longest]), ragged=shortest != longest)


def pack(tokens: Tokens) -> Tokens:
    """:func:`compact`, and where images differ in length the embeddings of all, end to end.

    Reads the lengths back from the device. :func:`unpack` gives what :func:`compact` gives, zeros
    for the dead.
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
    """The tokens of padded images as packed ones, as if all were alive; nothing moves."""
    batch, count = tokens.alive.shape
    place = torch.arange(batch * count, device=tokens.x.device)
    return replace(tokens, x=tokens.rows, packing=Packing((count,) * batch, place))


def close_up(tokens: Tokens, lengths: tuple[int, ...]) -> tuple[Tokens, Tensor]:
    """Packed tokens without those that died since.

    Args:
        tokens: packed as they were before.
        lengths: the numbers of living tokens now.

    Returns:
        The tokens in new memory, and ``(T,)`` the row of now of each row of before.
    """
    assert tokens.packing is not None
    longest, device = max(lengths), tokens.x.device
    stays = tokens.alive.flatten().index_select(0, tokens.packing.place)
    living = stays.nonzero()[:, 0]
    count = torch.tensor(lengths, device=device)
    alive = torch.arange(longest, device=device) < count[:, None]
    packing = Packing(lengths, alive.flatten().nonzero()[:, 0])
    size = tokens.size.flatten().index_select(0, tokens.packing.place.index_select(0, living))
    rank = tokens.alive.cumsum(1) - 1
    source = rank.gather(1, tokens.source.clamp(min=0))
    closed = replace(
        tokens,
        x=tokens.x.index_select(0, living),
        size=packing.unpack(size),
        alive=alive,
        source=torch.where(tokens.source >= 0, source, -1),
        ragged=min(lengths) != longest,
        moved=True,
        packing=packing,
    )
    return closed, stays.cumsum(0) - 1


def _compact_one(tokens: Tokens) -> Tokens:
    """:func:`compact` of a single image, without asking how many tokens are left.

    So ``torch.export`` can follow it.
    """
    living = tokens.alive[0].nonzero()[:, 0]
    if torch.compiler.is_compiling():  # torch 2.14 exports attention only of some tokens, not of 0
        torch._check(living.shape[0] > 0)
    rank = (tokens.alive[0].cumsum(0) - 1)[tokens.source.clamp(min=0)]
    return replace(
        tokens,
        x=tokens.x.index_select(1, living),
        size=tokens.size.index_select(1, living),
        alive=tokens.alive.index_select(1, living),
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
    """All but the embeddings of the tokens in another order, cut to ``longest``."""
    front, rank = order[:, :longest], inverse(order)
    source = rank.gather(1, tokens.source.clamp(min=0))
    return replace(
        tokens,
        size=tokens.size.gather(1, front),
        alive=tokens.alive.gather(1, front),
        source=torch.where(tokens.source >= 0, source, -1),
        moved=True,
    )


def _living_first(tokens: Tokens) -> Tensor:
    """``(B, N)`` the living tokens in their order, then the dead."""
    return torch.sort((~tokens.alive).to(torch.uint8), dim=1, stable=True).indices


def inverse(order: Tensor) -> Tensor:
    """The inverse of each row's permutation: ``(B, N)`` positions -> ``(B, N)`` ranks."""
    ranks = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, ranks)


def take(values: Tensor, index: Tensor) -> Tensor:
    """``(B, N, D)`` values, ``(B, A)`` which of each image's -> ``(B, A, D)``.

    Whole rows at once, several times faster on a CPU than an expanded ``gather``.
    """
    batch, count = values.shape[:2]
    first = torch.arange(batch, device=index.device) * count
    row = (index + first[:, None]).flatten()
    return values.flatten(0, 1).index_select(0, row).view(*index.shape, values.shape[-1])
