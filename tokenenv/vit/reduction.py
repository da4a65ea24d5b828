"""Operations that reduce tokens: prune, match, merge, fuse.

Pure functions on :class:`~tokenenv.vit.tokens.Tokens`, independent of models and policies.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenenv.vit import attention
from tokenenv.vit.layout import Packing
from tokenenv.vit.packing import close_up, cut, inverse, reorder, take
from tokenenv.vit.tokens import Tokens


def prune(tokens: Tokens, keep: Tensor, least: int = 0) -> Tokens:
    """Remove the visual tokens that are not kept, without moving any.

    An image that would have fewer than ``least`` visual tokens left is not pruned at all.

    Args:
        tokens: ``(B, N)`` tokens.
        keep: ``(B, N - prefix)`` bool; False prunes. Tokens removed before stay removed.
        least: fewest visual tokens of an image; at least 1 if ``tokens.keep_one``.

    Returns:
        The tokens with ``alive``, ``size`` and ``source`` updated.
    """
    kept = tokens.visual_alive & keep
    least = max(least, int(tokens.keep_one))
    if least:
        enough = kept.sum(1, keepdim=True) >= least
        kept = torch.where(enough, kept, tokens.visual_alive)
    alive = torch.cat([tokens.alive[:, : tokens.prefix], kept], dim=1)
    source = tokens.source
    if source is not None:
        owner = kept
        if tokens.moved:
            owner = alive.gather(1, source.clamp(min=0)) & (source >= 0)
        source = torch.where(owner, source, -1)
    return replace(tokens, alive=alive, size=tokens.size * alive, source=source, ragged=True)


class Match(NamedTuple):
    """Candidate pairs of a bipartite matching.

    Attributes:
        token: ``(B, A)`` index into ``N`` of each candidate, the token that would be removed.
        partner: ``(B, A)`` index into ``N`` of the token that it would be merged into.
        score: ``(B, A)`` cosine similarity of the two, -inf for a pair that can't be merged.
    """

    token: Tensor
    partner: Tensor
    score: Tensor


def bipartite_match(tokens: Tokens, metric: Tensor, first: int = 0) -> Match:
    """Best partner of every second visual token among the other visual tokens.

    ToMe, Bolya et al., ICLR 2023, section 3: the kept visual tokens are split alternately into A
    and B; each token of A is paired with its most similar token of B. Prefix tokens are left out.

    Args:
        tokens: ``(B, N)`` tokens.
        metric: ``(B, N, M)`` vectors to compare, for instance the mean-head keys.
        first: 0 or 1, index of the first kept visual token in A.

    Returns:
        One candidate per token of A, ``A = ceil((N - prefix - first) / 2)``.
    """
    unit = normalised(metric[:, tokens.prefix :])
    alive = tokens.visual_alive
    if tokens.ragged and tokens.packing is None:
        # A and B alternate over the kept tokens, wherever the removed ones are, so that an image
        # is matched alike in every execution and every batch.
        place = torch.sort((~alive).to(torch.uint8), dim=1, stable=True).indices
        best, choice = _propose(take(unit, place), alive.gather(1, place), first)
        place = place + tokens.prefix
        # One more partner: an image with a single visual token has none.
        partner = F.pad(place[:, 1 - first :: 2], (0, 1)).gather(1, choice)
        return Match(place[:, first::2], partner, best)
    packing = tokens.packing
    if packing is not None and packing.row is not None:
        best, choice = _propose_in_groups(unit, alive, first, packing, tokens.prefix)
    else:
        best, choice = _propose(unit, alive if tokens.ragged else None, first)
    count = tokens.alive.shape[1]
    token = torch.arange(tokens.prefix + first, count, 2, device=unit.device)
    # Where there is no partner, any index will do.
    partner = (choice * 2 + (tokens.prefix + 1 - first)).clamp(max=count - 1)
    return Match(token.expand(best.shape), partner, best)


def normalised(vectors: Tensor) -> Tensor:
    """Unit vectors, float32, of ``vectors (..., M)``; zeros stay zeros."""
    vectors = vectors.float()
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / length.clamp_(min=1e-12)


def _propose(unit: Tensor, alive: Tensor | None, first: int) -> tuple[Tensor, Tensor]:
    """The most similar token of B for each token of A.

    Args:
        unit: ``(B, n, M)`` unit vectors.
        alive: ``(B, n)`` bool, which tokens are kept; None if all are.
        first: 0 or 1, index of the first token of A.

    Returns:
        ``(B, A)`` the highest cosine, -inf if there is no pair; ``(B, A)`` the index in B.
    """
    one, other = unit[:, first::2], unit[:, 1 - first :: 2].transpose(1, 2)
    if alive is None:
        score = torch.bmm(one, other)
    else:
        # Adding -inf in the product hides removed tokens with one pass less than a mask.
        score = torch.baddbmm(
            torch.where(alive[:, None, 1 - first :: 2], 0.0, -torch.inf), one, other
        )
    # A single token has no partner. Where torch.export doesn't know the number, there may be one.
    if isinstance(score.shape[2], torch.SymInt) or not score.shape[2]:
        score = F.pad(score, (0, 1), value=-torch.inf)
    best, choice = score.max(dim=2)
    if alive is not None:
        best = best.masked_fill(~alive[:, first::2], -torch.inf)
    return best, choice


def _propose_in_groups(
    unit: Tensor, alive: Tensor, first: int, packing: Packing, prefix: int
) -> tuple[Tensor, Tensor]:
    """:func:`_propose` group by group: the work is quadratic in a group's length."""
    pairs = alive[:, first::2].shape[1]
    found, order = [], []
    for group in packing.groups:
        assert group.members is not None
        order.append(group.members)
        near, there = (
            t.index_select(0, group.members)[:, : group.length - prefix] for t in (unit, alive)
        )
        best, choice = _propose(near, None if group.full else there, first)
        missing = (0, pairs - best.shape[1])
        found.append((F.pad(best, missing, value=-torch.inf), F.pad(choice, missing)))
    best, choice = (torch.cat(parts) for parts in zip(*found, strict=True))
    back = torch.cat(order).argsort()
    return best.index_select(0, back), choice.index_select(0, back)


def candidates_first(tokens: Tokens, match: Match) -> Tensor:
    """The order that ToMe's published code gives tokens after a merge: kept candidates first.

    After the prefix tokens come the candidates of the match that were kept, then the other kept
    visual tokens, then removed ones. The order matters for the next block's split into A and B.
    Each group stays in its order, except that without prefix tokens the candidates are sorted by
    similarity, the most similar first, as in that code.

    Returns:
        ``(B, N)`` the old place of each new one.
    """
    candidate = torch.zeros_like(tokens.alive).scatter(1, match.token, True)
    group = torch.where(tokens.alive, 2 - candidate.to(torch.uint8), 3)
    group = F.pad(group[:, tokens.prefix :], (tokens.prefix, 0))  # before them, in group 0
    if tokens.prefix:
        return torch.sort(group, dim=1, stable=True).indices
    score = torch.zeros_like(tokens.size).scatter(1, match.token, match.score)
    falling = torch.sort(score, dim=1, descending=True, stable=True).indices
    ranks = torch.sort(group.gather(1, falling), dim=1, stable=True).indices
    return falling.gather(1, ranks)


def merge(
    tokens: Tokens,
    match: Match,
    accept: Tensor,
    weight: Tensor | None = None,
    left: int | None = None,
    shuffle: bool = False,
) -> Tokens:
    """Merge the accepted candidates into their partners.

    A partner becomes the weighted mean of itself and all tokens merged into it; sizes add up, and
    the patches of a merged token become its partner's (ToMe, section 3; weights: size by default).

    Padded tokens do not move unless ``shuffle``. Packed ones are packed again, which reads their
    lengths back from the device unless ``left`` is given.

    Args:
        tokens: ``(B, N)`` tokens.
        match: candidate pairs, ``(B, A)`` each.
        accept: ``(B, A)`` bool, which pairs to merge; those with score -inf are never merged.
        weight: ``(B, N)`` non-negative weights of the mean; None for the tokens' sizes.
        left: number of tokens left of every image if that is known, prefix included. Packed tokens
            then need not read their lengths back; padded ones that are shuffled are cut to it.
        shuffle: whether to order the tokens as :func:`candidates_first`.

    Returns:
        The tokens, with the merged candidates removed.
    """
    if left is not None and attention.exporting() and _plain(tokens, left, shuffle):
        return _merge_known(tokens, match, accept, weight, left, shuffle)
    # NaN counts as a pair: of values that overflowed as many are merged as was promised.
    accept = accept & (match.score != -torch.inf)
    # Counting the accepted pairs would wait for a GPU, and can't be compiled with the rest.
    waits = tokens.x.device.type != "cpu" or torch.compiler.is_compiling()
    if not waits or (tokens.packing is not None and left is None):
        return _merge_some(tokens, match, accept, weight, left, shuffle)
    weight = (tokens.size if weight is None else weight).float()
    moving = torch.where(accept, weight.gather(1, match.token), 0.0)
    moved_size = torch.where(accept, tokens.size.gather(1, match.token), 0.0)
    total = weight.scatter_add(1, match.partner, moving)
    # x_p + sum_a w_a (x_a - x_p) / W_p: exact for a token into which nothing is merged.
    share = (moving / total.gather(1, match.partner).clamp(min=1e-12)).flatten()
    giver, taker = tokens.row(match.token).flatten(), tokens.row(match.partner).flatten()
    x = tokens.rows
    step = share[:, None].to(x.dtype) * (x.index_select(0, giver) - x.index_select(0, taker))
    gone = torch.zeros_like(tokens.alive).scatter(1, match.token, accept)
    size = tokens.size.scatter_add(1, match.partner, moved_size)
    alive = tokens.alive & ~gone
    merged = _without(tokens, match, accept, alive, size * alive)
    merged = replace(merged, x=x.index_add(0, taker, step).view_as(tokens.x))
    if tokens.packing is not None:
        return close_up(merged, left, candidates_first(merged, match) if shuffle else None)[0]
    return _shuffled(merged, match, left) if shuffle else merged


def _plain(tokens: Tokens, left: int, shuffle: bool) -> bool:
    """Whether :func:`_merge_known` can merge these tokens."""
    apart = tokens.packing is not None or tokens.ragged or tokens.source is not None
    removes = left < tokens.alive.shape[1]
    return removes and not apart and (tokens.prefix > 0 or not shuffle)


def _merge_known(
    tokens: Tokens, match: Match, accept: Tensor, weight: Tensor | None, left: int, shuffle: bool
) -> Tokens:
    """:func:`merge` that cuts to the known number of tokens, in few operations, for ONNX."""
    batch, count = tokens.alive.shape
    # As in candidates_first; removed tokens come last, and so are known by their places.
    usual, candidate = (2.0, 1.0) if shuffle else (0.0, 0.0)
    group = F.pad(tokens.size.new_full((count - tokens.prefix,), usual), (tokens.prefix, 0))
    group = group.expand(batch, count).scatter(1, match.token, torch.where(accept, 3.0, candidate))
    order = torch.sort(group, dim=1, stable=True).indices
    gone = order[:, left:]
    partner = torch.zeros_like(order).scatter(1, match.token, match.partner).gather(1, gone)
    moved = tokens.size.gather(1, gone)
    size = tokens.size.scatter_add(1, partner, moved)
    if weight is None:
        share = moved / size.gather(1, partner)
    else:
        moving = weight.float().gather(1, gone)
        total = weight.float().scatter_add(1, partner, moving)
        share = moving / total.gather(1, partner).clamp(min=1e-12)
    x, taker = tokens.rows, tokens.row(partner).flatten()
    step = _step(x, tokens.row(gone).flatten(), taker, share.flatten())
    x = x.index_add(0, taker, step).view_as(tokens.x)
    return cut(replace(tokens, x=x, size=size, moved=True, merged=True), order, left)


def _merge_some(
    tokens: Tokens,
    match: Match,
    accept: Tensor,
    weight: Tensor | None,
    left: int | None,
    shuffle: bool,
) -> Tokens:
    """:func:`merge` that computes the accepted pairs only; their number is read back."""
    batch, count = tokens.alive.shape
    some = accept.flatten().nonzero()[:, 0]
    giver, taker = (index.flatten().index_select(0, some) for index in match[:2])
    first = some.div(accept.shape[1], rounding_mode="floor") if batch > 1 else None
    if first is not None:
        giver, taker = giver + first * count, taker + first * count
    size = tokens.size.flatten()
    gone = size.index_select(0, giver)
    size = size.index_add(0, taker, gone)
    if weight is None:
        share = gone / size.index_select(0, taker)
    else:
        flat = weight.float().flatten()
        moving = flat.index_select(0, giver)
        total = flat.index_add(0, taker, moving).index_select(0, taker)
        share = moving / total.clamp(min=1e-12)
    alive = tokens.alive.flatten().index_fill(0, giver, False).view(batch, count)
    size = size.index_fill_(0, giver, 0.0).view(batch, count)
    merged = _without(tokens, match, accept, alive, size)
    x, packing = tokens.rows, tokens.packing
    if packing is not None and packing.row is not None:
        row = packing.row.flatten()
        step = _step(x, row.index_select(0, giver), row.index_select(0, taker), share)
    else:
        step = _step(x, giver, taker, share)
    if packing is None:
        merged = replace(merged, x=x.index_add(0, taker, step).view_as(tokens.x))
        return _shuffled(merged, match, left) if shuffle else merged
    order = candidates_first(merged, match) if shuffle else None
    closed, place = close_up(merged, left, order)
    if place is not None:
        # In place: it is new memory.
        closed.x.index_add_(0, place.flatten().index_select(0, taker), step)
    return closed


def _step(x: Tensor, giver: Tensor, taker: Tensor, share: Tensor) -> Tensor:
    """``(m, D)`` what each pair adds to its partner: exact where nothing is merged."""
    apart = x.index_select(0, giver) - x.index_select(0, taker)
    return apart.mul_(share[:, None].to(x.dtype))


def _without(tokens: Tokens, match: Match, accept: Tensor, alive: Tensor, size: Tensor) -> Tokens:
    """The tokens after their accepted candidates went to their partners; ``x`` is unchanged."""
    source = tokens.source
    if source is not None:
        # The token that now stands for every token's patches: itself, or its partner.
        itself = torch.arange(alive.shape[1], device=alive.device).expand_as(alive)
        partner = torch.where(accept, match.partner, match.token)
        target = itself.scatter(1, match.token, partner)
        source = torch.where(source >= 0, target.gather(1, source.clamp(min=0)), source)
    return replace(
        tokens, size=size, alive=alive, source=source, ragged=True, moved=True, merged=True
    )


def _shuffled(tokens: Tokens, match: Match, left: int | None) -> Tokens:
    order = candidates_first(tokens, match)
    if left is not None:
        return cut(tokens, order, left)
    return replace(reorder(tokens, order, order.shape[1]), x=take(tokens.x, order))


def fuse(tokens: Tokens, keep: Tensor, weight: Tensor) -> Tokens:
    """Fuse all visual tokens that are not kept into one, at the position of the heaviest.

    Args:
        tokens: ``(B, N)`` tokens.
        keep: ``(B, N - prefix)`` bool; False for a token to fuse.
        weight: ``(B, N - prefix)`` non-negative weights of the mean.

    Returns:
        The tokens; of those fused, one is left, and it stands for the patches of all.
    """
    fused = tokens.visual_alive & ~keep
    heaviest = weight.masked_fill(~fused, -torch.inf).argmax(1, keepdim=True)
    place = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
    partner = heaviest.expand_as(place) + tokens.prefix
    match = Match(place + tokens.prefix, partner, torch.zeros_like(weight))
    return merge(tokens, match, fused & (place != heaviest), F.pad(weight, (tokens.prefix, 0)))


def strongest(match: Match, count: int | Tensor) -> Tensor:
    """``(B, A)`` bool, the ``count`` most similar candidates: the pairs that ToMe merges.

    ``count``: one number, or ``(B, 1)``, one per image.
    """
    return highest(match.score, count)


def highest(score: Tensor, count: int | Tensor) -> Tensor:
    """``(B, A)`` bool, the ``count`` highest of ``score (B, A)`` in each row; ties: the first."""
    order = torch.sort(score, dim=1, descending=True, stable=True).indices
    if isinstance(count, int):
        return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order[:, :count], True)
    return inverse(order) < count
