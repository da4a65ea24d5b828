"""Decisions that are planned with the model itself, by beam search."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from agents.policies.heuristics import Heuristic, keep_highest
from tokenenv.errors import UserError
from tokenenv.game.checks import check_whole
from tokenenv.game.cost import Cost
from tokenenv.game.episode import Episode
from tokenenv.game.rewards.base import divergence
from tokenenv.game.rules import LayerMerge, Observation, TokenPrune
from tokenenv.measure.episodes import macs_so_far
from tokenenv.vit.reduction import strongest

_MOST_PRUNED = 0.9  # share of an image's tokens in one decision
_WIDEST, _FINEST = 64, 64


@dataclass
class Beam(Heuristic):
    """Plans all decisions of an image before the first one: a reference of what planning reaches.

    The search minimises ``KL(dense || reduced) + price * MACs / dense MACs``: it knows what the
    dense model predicts and tries decisions on copies of the episode, and it reads no label. A
    plan that is not complete is judged as if nothing more were removed. At each decision
    :attr:`tries` shares of the tokens are tried, from none to all that may go; which tokens go is
    decided by a fixed criterion.

    The beam is nested: place ``i`` follows the best continuation of the plans at places ``0`` to
    ``i`` that no place before it follows. Place 0 is then the greedy search at any width, and a
    wider beam finds no worse plan.

    The passes of the search, ``width * tries / 2`` per decision, are not among the policy's
    multiply-adds: it is an oracle, and saves nobody any time.
    """

    price: float
    width: int = 4
    tries: int = 5
    _chosen: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.price >= 0:
            raise UserError(f"price={self.price:g} of multiply-adds: give 0 or more")
        check_whole("width", self.width, 1, _WIDEST + 1)
        check_whole("tries", self.tries, 2, _FINEST + 1)

    def act(self, observation: Observation) -> Tensor:
        """Raise :class:`UserError`: an observation is not enough to plan with."""
        raise UserError(
            f"{type(self).__name__} plans on an episode, not on an observation: use it as a "
            "method, or call its next_action(game.episode)"
        )

    def next_action(self, episode: Episode) -> Tensor:
        """The planned actions; at the first decision the episode is planned."""
        if episode.step == 0:
            self._chosen = self.plan(episode)
        assert self._chosen is not None
        return self.removing(episode, self._chosen[:, episode.step, None])

    def removing(self, episode: Episode, share: Tensor) -> Tensor:
        """The actions that remove a ``share (B, 1)``, 0 to 1, of what may go."""
        raise NotImplementedError

    def plan(self, episode: Episode) -> Tensor:
        """``(B, T)`` the share to remove at each decision from the one that is due.

        Args:
            episode: at a decision; it does not change.
        """
        found, _ = self.search(episode)
        return found

    def search(self, episode: Episode) -> tuple[Tensor, Tensor]:
        """:meth:`plan`, and ``(B,)`` what the search minimised, of these plans."""
        device, images = episode.tokens.alive.device, len(episode.tokens.alive)
        cost, first = Cost(episode.backbone), torch.arange(images, device=device)
        dense = episode.finish(first)
        shares = torch.linspace(0, 1, self.tries, device=device)
        taken, held = shares.new_zeros(images, 1, 0), episode
        while True:
            plans = taken.shape[1]
            every = torch.arange(images * plans, device=device).repeat_interleave(self.tries)
            tried = held.select(every)
            tried.act(self.removing(tried, shares.repeat(images * plans)[:, None]))
            scores = self._scores(tried, dense, cost).view(images, -1)
            best = nested(scores, self.tries, self.width)
            before = taken.gather(1, (best // self.tries)[..., None].expand(-1, -1, taken.shape[2]))
            taken = torch.cat([before, shares[best % self.tries][..., None]], 2)
            if tried.done:
                break
            held = tried.select((best + first[:, None] * scores.shape[1]).flatten())
        least, place = scores.gather(1, best).min(1)
        return taken[first, place], least

    def _scores(self, tried: Episode, dense: Tensor, cost: Cost) -> Tensor:
        """``(B S,)`` what is minimised; ``dense`` is ``(B, K)``."""
        rows = torch.arange(len(tried.counts[-1]), device=dense.device)
        target = dense.repeat_interleave(len(rows) // max(len(dense), 1), dim=0)
        damage = divergence(target, tried.finish(rows), tau=1.0)
        return damage + self.price * (macs_so_far(tried, self, cost) / cost.dense()).float()


def nested(scores: Tensor, tries: int, width: int) -> Tensor:
    """The continuations that the places of a nested beam follow.

    Args:
        scores: ``(B, S * tries)`` of the continuations, those of the plan at place 0 first.
        tries: continuations of each plan.
        width: the largest number of places.

    Returns:
        ``(B, W)`` indices, ``W = min(width, S * tries)``.
    """
    found = []
    for place in range(min(width, scores.shape[1])):
        best = scores[:, : (place + 1) * tries].argmin(1, keepdim=True)
        scores = scores.scatter(1, best, torch.inf)
        found.append(best)
    return torch.cat(found, 1)


@dataclass
class BeamMerge(Beam):
    """Beam search over how many pairs merge, the most similar first (ToMe's criterion)."""

    rules: LayerMerge = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rules = replace(self.rules, features=("similarity",), share=False)

    def removing(self, episode: Episode, share: Tensor) -> Tensor:
        """``(B, A)`` bool, the pairs to merge: a share of those that are possible."""
        match = episode.moment.match
        assert match is not None
        possible = (match.score > -torch.inf).sum(1, keepdim=True)
        return strongest(match, (share * possible).round().long())


@dataclass
class BeamPrune(Beam):
    """Beam search over how many tokens are pruned, those of least class attention first."""

    rules: TokenPrune = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rules = replace(self.rules, features=("cls_attention",), share=False)

    def removing(self, episode: Episode, share: Tensor) -> Tensor:
        """``(B, A)`` int64, 1 for kept tokens; a share of 1 prunes nine tenths."""
        seen = episode.observe()
        score = seen.feature("cls_attention")[..., 0]
        return keep_highest(score, seen.active, 1 - _MOST_PRUNED * share)
