"""What can be done to tokens: prune, match, merge, fuse.

Pure functions on :class:`~tokenenv.vit.tokens.Tokens`; nothing here knows a model or a policy.
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
    """Kill the visual tokens that are not kept; nothing moves.

    Where fewer than ``least`` visual tokens would be left of an image, it keeps those it has.

    Args:
        tokens: ``(B, N)`` tokens.
        keep: ``(B, N - prefix)`` bool; False for a token that leaves. Dead tokens stay dead.
        least: visual tokens to stay; at least 1 where an image needs one (``tokens.keep_one``).

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
        token: ``(B, A)`` index into ``N`` of each candidate.
        partner: ``(B, A)`` index into ``N`` of the token it would merge into.
        score: ``(B, A)`` cosine similarity of the two, -inf where the candidate may not merge.
    """

    token: Tensor
    partner: Tensor
    score: Tensor


def bipartite_match(tokens: Tokens, metric: Tensor, first: int = 0) -> Match:
    """Best partner of every second visual token among the other visual tokens.

    ToMe, Bolya et al. 2023, section 3: living visual tokens are split alternately into A and B;
    each token of A proposes its most similar token of B. Prefix tokens take no part.

    Args:
        tokens: ``(B, N)`` tokens.
        metric: ``(B, N, M)`` what similarity is measured on, for instance the mean-head keys.
        first: 0 or 1, which living visual token is the first of A.

    Returns:
        One candidate per token of A, ``A = ceil((N - prefix - first) / 2)``.
    """
    unit = F.normalize(metric[:, tokens.prefix :].float(), dim=-1)
    alive = tokens.visual_alive
    place = torch.arange(alive.shape[1], device=alive.device).expand_as(alive)
    if tokens.ragged and tokens.packing is None:
        # Who is in A is a matter of rank among the living, wherever the dead lie: an image is
        # matched alike in every execution and every batch.
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
    # A lone token has nobody to propose to: one partner more, so that there is any.
    partner = F.pad(place[:, 1 - first :: 2], (0, 1)).gather(1, choice)
    return Match(place[:, first::2], partner, best)


def _propose(unit: Tensor, alive: Tensor | None, first: int) -> tuple[Tensor, Tensor]:
    """``(B, n, M)`` unit vectors -> for each of A the highest cosine, and which of B has it.

    ``alive``: ``(B, n)``, None where all are. Both results ``(B, A)``; -inf where there is none.
    """
    one, other = unit[:, first::2], unit[:, 1 - first :: 2].transpose(1, 2)
    if alive is None:
        score = one @ other
    else:
        # What is added to the products hides the dead; a pass over all pairs less than a mask.
        score = torch.baddbmm(
            torch.where(alive[:, None, 1 - first :: 2], 0.0, -torch.inf), one, other
        )
    best, choice = F.pad(score, (0, 1), value=-torch.inf).max(dim=2)
    if alive is not None:
        best = best.masked_fill(~alive[:, first::2], -torch.inf)
    return best, choice


_GROUPS = 4
"""Of so many the largest is rarely much larger than its mean; more would be calls without work."""


def _propose_in_groups(
    unit: Tensor, alive: Tensor, first: int, lengths: list[int]
) -> tuple[Tensor, Tensor]:
    """:func:`_propose` among images of like length, their living tokens first.

    Work is quadratic in the longest: who is short is spared it.
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
    """Put the living candidates of a match before the other living visual tokens.

    So ToMe's published code lays them out after a merge, which decides who meets whom in the next
    block. Each of the two groups keeps its order, but without prefix tokens the candidates lie as
    there: the most similar first. Dead tokens come last.
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

    Nothing moves, but packed tokens close up: they read their lengths back from the device.

    The merged embedding is the weighted mean of all tokens that meet in a partner; sizes add up
    and every patch of a merged token follows it (ToMe, section 3; weights: size by default).

    Args:
        tokens: ``(B, N)`` tokens.
        match: candidate pairs, ``(B, A)`` each.
        accept: ``(B, A)`` bool, which candidates merge; impossible pairs (score -inf) never do.
        weight: ``(B, N)`` non-negative weights of the mean; None for the tokens' sizes.

    Returns:
        The tokens; merged candidates are dead.
    """
    accept = accept & torch.isfinite(match.score)
    weight = (tokens.size if weight is None else weight).float()
    moving = torch.where(accept, weight.gather(1, match.token), 0.0)
    moved_size = torch.where(accept, tokens.size.gather(1, match.token), 0.0)

    total = weight.scatter_add(1, match.partner, moving)
    # x_p + sum_a w_a (x_a - x_p) / W_p: a token that receives nothing keeps its exact value.
    share = (moving / total.gather(1, match.partner).clamp(min=1e-12)).flatten()
    giver, taker = tokens.row(match.token).flatten(), tokens.row(match.partner).flatten()
    if tokens.packing is not None or tokens.x.device.type == "cpu":
        # Most candidates don't merge: no work for them. Elsewhere the device would be waited for.
        some = accept.flatten().nonzero()[:, 0]
        share, giver, taker = share[some], giver[some], taker[some]
    x = tokens.rows
    step = share[:, None].to(x.dtype) * (x.index_select(0, giver) - x.index_select(0, taker))

    gone = torch.zeros_like(tokens.alive).scatter(1, match.token, accept)
    alive = tokens.alive & ~gone
    # Where every token's patches live now: itself, or its partner.
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
    closed.x.index_add_(0, now.index_select(0, taker), step)  # new memory: nobody else reads it
    return closed


def fuse(tokens: Tokens, keep: Tensor, weight: Tensor) -> Tokens:
    """Make one token of all visual tokens that are not kept, where the heaviest of them lies.

    Args:
        tokens: ``(B, N)`` tokens.
        keep: ``(B, N - prefix)`` bool; False for a token that goes into the fused one.
        weight: ``(B, N - prefix)`` non-negative weights of the mean.

    Returns:
        The tokens; all but one of those not kept are dead, and their patches are that one's.
    """
    fused = tokens.visual_alive & ~keep
    heaviest = weight.masked_fill(~fused, -torch.inf).argmax(1, keepdim=True)
    place = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
    partner = heaviest.expand_as(place) + tokens.prefix
    match = Match(place + tokens.prefix, partner, torch.zeros_like(weight))
    return merge(tokens, match, fused & (place != heaviest), F.pad(weight, (tokens.prefix, 0)))


def strongest(match: Match, count: int | Tensor) -> Tensor:
    """Accept the ``count`` most similar candidates: ``(B, A)`` bool. ToMe's rule.

    ``count``: one number, or ``(B, 1)`` for each image its own.
    """
    return highest(match.score, count)


def highest(score: Tensor, count: int | Tensor) -> Tensor:
    """``(B, A)`` bool, the ``count`` highest scores of each row; of equal ones the first."""
    order = torch.sort(score, dim=1, descending=True, stable=True).indices
    return inverse(order) < count
