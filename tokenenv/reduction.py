"""What can be done to tokens: prune, compact, match, merge.

Pure functions on :class:`~tokenenv.tokens.Tokens`; nothing here knows a model or a policy.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from tokenenv.tokens import Tokens


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
    owner = alive.gather(1, tokens.source.clamp(min=0)) & (tokens.source >= 0)
    return replace(
        tokens,
        alive=alive,
        size=torch.where(alive, tokens.size, tokens.size.new_zeros(())),
        source=torch.where(owner, tokens.source, -1),
        ragged=True,
    )


def compact(tokens: Tokens) -> Tokens:
    """Move the living tokens to the front and cut to the longest image of the batch.

    This is what frees memory and time. It reads one number back from the device. The order of
    the living tokens is kept; the result is not ragged if all images are equally long.
    """
    if not tokens.ragged:
        return tokens
    counts = tokens.counts()
    shortest, longest = (int(v) for v in torch.stack(counts.aminmax()).tolist())
    if shortest == tokens.x.shape[1]:
        return replace(tokens, ragged=False)
    # A stable sort of the dead flags: living tokens first, in their order.
    order = torch.sort((~tokens.alive).to(torch.uint8), dim=1, stable=True).indices
    rank = inverse(order)
    front = order[:, :longest]
    living = tokens.source >= 0
    return replace(
        tokens,
        x=tokens.x.gather(1, front[..., None].expand(-1, -1, tokens.x.shape[2])),
        size=tokens.size.gather(1, front),
        alive=tokens.alive.gather(1, front),
        source=torch.where(living, rank.gather(1, tokens.source.clamp(min=0)), -1),
        ragged=shortest != longest,
        moved=True,
    )


def inverse(order: Tensor) -> Tensor:
    """The inverse of each row's permutation: ``(B, N)`` positions -> ``(B, N)`` ranks."""
    ranks = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, ranks)


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


def bipartite_match(tokens: Tokens, metric: Tensor) -> Match:
    """Best partner of every second visual token among the other visual tokens.

    ToMe, Bolya et al. 2023, section 3.2: living visual tokens are split alternately into A and B;
    each token of A proposes its most similar token of B. Prefix tokens take no part.

    Args:
        tokens: ``(B, N)`` tokens.
        metric: ``(B, N, M)`` what similarity is measured on, for instance the mean-head keys.

    Returns:
        One candidate per token of A, ``A = ceil((N - prefix) / 2)``.
    """
    unit = torch.nn.functional.normalize(metric[:, tokens.prefix :].float(), dim=-1)
    alive = tokens.visual_alive
    place = torch.arange(alive.shape[1], device=alive.device).expand_as(alive)
    if tokens.ragged:
        # Who is in A is a matter of rank among the living, wherever the dead lie: an image is
        # matched alike in every execution and every batch.
        place = torch.sort((~alive).to(torch.uint8), dim=1, stable=True).indices
        unit = unit.gather(1, place[..., None].expand_as(unit))
        alive = alive.gather(1, place)
    score = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    pair = alive[:, ::2, None] & alive[:, None, 1::2]
    score = score.masked_fill(~pair, -torch.inf)
    token, other = place[:, ::2] + tokens.prefix, place[:, 1::2] + tokens.prefix
    if score.shape[2] == 0:  # a lone token has nobody to propose to
        return Match(token, token, score.new_full(token.shape, -torch.inf))
    best, choice = score.max(dim=2)
    return Match(token, other.gather(1, choice), best)


def merge(tokens: Tokens, match: Match, accept: Tensor, weight: Tensor | None = None) -> Tokens:
    """Merge the accepted candidates into their partners; nothing moves.

    The merged embedding is the weighted mean of all tokens that meet in a partner; sizes add up
    and every patch of a merged token follows it (ToMe, section 3.2; weights: size by default).

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

    wide = match.token[..., None].expand(-1, -1, tokens.x.shape[2])
    into = match.partner[..., None].expand_as(wide)
    total = weight.scatter_add(1, match.partner, moving)
    # x_p + sum_a w_a (x_a - x_p) / W_p: a token that receives nothing keeps its exact value.
    share = (moving / total.gather(1, match.partner).clamp(min=1e-12))[..., None]
    step = share.to(tokens.x.dtype) * (tokens.x.gather(1, wide) - tokens.x.gather(1, into))
    x = tokens.x.scatter_add(1, into, step)

    gone = torch.zeros_like(tokens.alive).scatter(1, match.token, accept)
    alive = tokens.alive & ~gone
    # Where every token's patches live now: itself, or its partner.
    itself = torch.arange(x.shape[1], device=x.device).expand_as(alive)
    partner = torch.where(accept, match.partner, match.token)
    target = itself.scatter(1, match.token, partner)
    size = tokens.size.scatter_add(1, match.partner, moved_size)
    return replace(
        tokens,
        x=x,
        size=torch.where(alive, size, size.new_zeros(())),
        alive=alive,
        source=torch.where(
            tokens.source >= 0, target.gather(1, tokens.source.clamp(min=0)), tokens.source
        ),
        ragged=True,
        moved=True,
        merged=True,
    )


def strongest(match: Match, count: int | Tensor) -> Tensor:
    """Accept the ``count`` most similar candidates: ``(B, A)`` bool. ToMe's rule.

    ``count``: one number, or ``(B, 1)`` for each image its own.
    """
    return highest(match.score, count)


def highest(score: Tensor, count: int | Tensor) -> Tensor:
    """``(B, A)`` bool, the ``count`` highest scores of each row; of equal ones the first."""
    order = torch.sort(score, dim=1, descending=True, stable=True).indices
    return inverse(order) < count
