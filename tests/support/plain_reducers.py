"""Published methods token by token on one image, from their papers' equations.

``one`` has, of each visual token that is left, ``x``, ``size`` and ``patches`` by its index, and
``prune(index)`` and ``merge(giver, taker)``; ``about`` what the attention said of all tokens.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor


def cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a.double(), b.double(), dim=0).item()


def best_pairs(one: Any, about: dict[str, Tensor], r: int) -> list[tuple[int, int]]:
    """ToMe's ``r`` most similar pairs of giver and taker."""
    key, order = about["mean_keys"], sorted(one.x)
    takers = order[1::2]
    if not takers:
        return []
    best = {a: max(takers, key=lambda b: cosine(key[a], key[b])) for a in order[::2]}
    chosen = sorted(best, key=lambda a: -cosine(key[a], key[best[a]]))[:r]
    return [(a, best[a]) for a in chosen]


def tofu(one: Any, about: dict[str, Tensor], reducer: Any) -> None:
    first = reducer.depth // 2 if reducer.merge_from < 0 else reducer.merge_from
    largest: dict[int, float] = {}
    for giver, taker in best_pairs(one, about, reducer.r[0]):
        if reducer.blocks[0] < first:
            one.prune(giver)
            continue
        before = largest.get(taker, one.x[taker].norm().item())
        largest[taker] = max(before, one.x[giver].norm().item())
        one.merge(giver, taker)
    for taker, norm in largest.items():
        one.x[taker] = one.x[taker] / one.x[taker].norm() * norm


def atc(one: Any, about: dict[str, Tensor], reducer: Any) -> None:
    """One join after another."""
    key, goal = about["mean_keys"], math.ceil(reducer.keep * len(one.x) - 1e-9)
    clusters = [[i] for i in sorted(one.x)]

    def linkage(pair: tuple[list[int], list[int]]) -> float:
        every = [cosine(key[a], key[b]) for a, b in itertools.product(*pair)]
        return sum(every) / len(every)

    while len(clusters) > goal:
        left, right = max(itertools.combinations(clusters, 2), key=linkage)
        clusters = [c for c in clusters if c not in (left, right)] + [left + right]
    for cluster in clusters:
        for i in sorted(cluster)[1:]:
            one.merge(i, min(cluster))


def mctf(one: Any, about: dict[str, Tensor], reducer: Any) -> None:
    living, heads = about["alive"].nonzero()[:, 0].tolist(), about["attention"].double().mean(0)
    a = {i: sum(float(heads[j, i]) for j in living) / len(living) for i in one.x}
    order = sorted(one.x)
    half = reducer.r[0] // 2
    for givers, takers, count in (
        (order[::2], order[1::2], reducer.r[0] - half),
        (order[1::2], order[::2], half),
    ):
        here = [i for i in takers if i in one.x]
        if not here:
            continue

        def attraction(i: int, j: int) -> float:
            similar = (cosine(one.x[i], one.x[j]) + 1) / 2
            return similar * (a[i] * a[j]) ** (-1 / 20) * (one.size[i] * one.size[j]) ** (-1 / 40)

        best = {i: max(here, key=lambda j, i=i: attraction(i, j)) for i in givers}
        chosen = sorted(best, key=lambda i: -attraction(i, best[i]))[:count]
        for taker in {best[i] for i in chosen}:
            members = [taker, *(i for i in chosen if best[i] == taker)]
            weight = {i: a[i] * one.size[i] for i in members}
            mean = sum(weight[i] * one.x[i].double() for i in members) / sum(weight.values())
            for i in members[1:]:
                one.merge(i, taker)
                a[taker] += a[i]
            one.x[taker] = mean.float()


def shift(one: Any, about: dict[str, Tensor], reducer: Any) -> None:
    moved = {i: (one.x[i] - about["embeddings"][i]).norm().item() for i in one.x}
    order = sorted(one.x, key=lambda i: -moved[i])
    for i in order[math.ceil(reducer.keep * len(order) - 1e-9) :]:
        one.prune(i)
