"""Operations that reduce tokens: prune, match, merge, fuse.

Pure functions on :class:`~tokenenv.vit.tokens.Tokens`, independent of models and policies.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenenv.vit.packing import (
    close_up,
    inverse,
    reorder,
    take,
)
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
    owner = kept
    if tokens.moved:
        owner = alive.gather(1, tokens.source.clamp(min=0)) & (tokens.source >= 0)
    return replace(
        tokens,
        alive=alive,
        size=torch.where(alive, tokens.size, tokens.size.new_zeros(())),
        source=torch.where(owner, tokens.source, -1),
        ragged=True,
    )


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
    unit = F.normalize(metric[:, tokens.prefix :].float(), dim=-1)
    alive = tokens.visual_alive
    place = torch.arange(alive.shape[1], device=alive.device).expand_as(alive)
    if tokens.ragged and tokens.packing is None:
        # A and B alternate over the kept tokens, wherever the removed ones are, so that an image
        # is matched alike in every execution and every batch.
        place = torch.sort((~alive).to(torch.uint8), dim=1, stable=True).indices
        unit = take(unit, place)
        alive = alive.gather(1, place)
    if not tokens.ragged:
        best, choice = _propose(unit, None, first)
    elif tokens.packing is None:
        best, choice = _propose(unit, alive, first)
    else:
        visual = [length - tokens.prefix for length in tokens.packing.lengths]
        best, choice = _propose_in_groups(unit, alive, first, visual)
    place = place + tokens.prefix
    # One more partner: an image with a single visual token has none.
    partner = F.pad(place[:, 1 - first :: 2], (0, 1)).gather(1, choice)
    return Match(place[:, first::2], partner, best)


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
        score = one @ other
    else:
        # Adding -inf in the product hides removed tokens with one pass less than a mask.
        score = torch.baddbmm(
            torch.where(alive[:, None, 1 - first :: 2], 0.0, -torch.inf), one, other
        )
    best, choice = F.pad(score, (0, 1), value=-torch.inf).max(dim=2)
    if alive is not None:
        best = best.masked_fill(~alive[:, first::2], -torch.inf)
    return best, choice


_GROUPS = 4
"""Groups of images of similar length: fewer waste work on padding, more cost calls."""


def _propose_in_groups(
    unit: Tensor, alive: Tensor, first: int, lengths: list[int]
) -> tuple[Tensor, Tensor]:
    """:func:`_propose` in groups of images of similar length, whose kept tokens come first.

    The work per image is quadratic in the length of the longest in its group.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    images = torch.tensor(order, device=unit.device)
    pairs = alive[:, first::2].shape[1]
    found, size = [], -(-len(order) // _GROUPS)
    for start in range(0, len(order), size):
        group = images[start : start + size]
        longest = max(lengths[i] for i in order[start : start + size])
        near, there = (t.index_select(0, group)[:, :longest] for t in (unit, alive))
        best, choice = _propose(near, there, first)
        missing = (0, pairs - best.shape[1])
        found.append((F.pad(best, missing, value=-torch.inf), F.pad(choice, missing)))
    best, choice = (torch.cat(parts) for parts in zip(*found, strict=True))
    back = images.argsort()
    return best.index_select(0, back), choice.index_select(0, back)


def candidates_first(tokens: Tokens, match: Match) -> Tokens:
    """Order tokens as ToMe's published code does after a merge: kept candidates first.

    After the prefix tokens come the candidates of the match that were kept, then the other kept
    visual tokens, then removed ones. The order matters for the next block's split into A and B.
    Each group stays in its order, except that without prefix tokens the candidates are sorted by
    similarity, the most similar first, as in that code.
    """
    candidate = torch.zeros_like(tokens.alive).scatter(1, match.token, True)
    group = torch.where(tokens.alive, 2 - candidate.long(), 3)
    group[:, : tokens.prefix] = 0
    if tokens.prefix:
        order = torch.sort(group, dim=1, stable=True).indices
    else:
        score = torch.zeros_like(tokens.size).scatter(1, match.token, match.score)
        falling = torch.sort(score, dim=1, descending=True, stable=True).indices
        ranks = torch.sort(group.gather(1, falling), dim=1, stable=True).indices
        order = falling.gather(1, ranks)
    return replace(reorder(tokens, order, order.shape[1]), x=take(tokens.x, order))


def merge(tokens: Tokens, match: Match, accept: Tensor, weight: Tensor | None = None) -> Tokens:
    """Merge the accepted candidates into their partners.

    A partner becomes the weighted mean of itself and all tokens merged into it; sizes add up, and
    the patches of a merged token become its partner's (ToMe, section 3; weights: size by default).

    Padded tokens do not move. Packed ones are packed again, which reads their lengths back from
    the device.

    Args:
        tokens: ``(B, N)`` tokens.
        match: candidate pairs, ``(B, A)`` each.
        accept: ``(B, A)`` bool, which pairs to merge; those with score -inf are never merged.
        weight: ``(B, N)`` non-negative weights of the mean; None for the tokens' sizes.

    Returns:
        The tokens, with the merged candidates removed.
    """
    accept = accept & torch.isfinite(match.score)
    weight = (tokens.size if weight is None else weight).float()
    moving = torch.where(accept, weight.gather(1, match.token), 0.0)
    moved_size = torch.where(accept, tokens.size.gather(1, match.token), 0.0)

    total = weight.scatter_add(1, match.partner, moving)
    # x_p + sum_a w_a (x_a - x_p) / W_p: exact for a token into which nothing is merged.
    share = (moving / total.gather(1, match.partner).clamp(min=1e-12)).flatten()
    giver, taker = tokens.row(match.token).flatten(), tokens.row(match.partner).flatten()
    if tokens.packing is not None or tokens.x.device.type == "cpu":
        # Skip the candidates that are not merged. On other devices that would synchronise.
        some = accept.flatten().nonzero()[:, 0]
        share, giver, taker = share[some], giver[some], taker[some]
    x = tokens.rows
    step = share[:, None].to(x.dtype) * (x.index_select(0, giver) - x.index_select(0, taker))

    gone = torch.zeros_like(tokens.alive).scatter(1, match.token, accept)
    alive = tokens.alive & ~gone
    # The token that now stands for every token's patches: itself, or its partner.
    itself = torch.arange(alive.shape[1], device=x.device).expand_as(alive)
    partner = torch.where(accept, match.partner, match.token)
    target = itself.scatter(1, match.token, partner)
    size = tokens.size.scatter_add(1, match.partner, moved_size)
    merged = replace(
        tokens,
        size=torch.where(alive, size, size.new_zeros(())),
        alive=alive,
        source=torch.where(
            tokens.source >= 0, target.gather(1, tokens.source.clamp(min=0)), tokens.source
        ),
        ragged=True,
        moved=True,
        merged=True,
    )
    if tokens.packing is None:
        return replace(merged, x=x.index_add(0, taker, step).view_as(tokens.x))
    closed, now = close_up(merged, tuple(merged.counts().tolist()))
    closed.x.index_add_(0, now.index_select(0, taker), step)  # in place: it is new memory
    return closed


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
    return inverse(order) < count
