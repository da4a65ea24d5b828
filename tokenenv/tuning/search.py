"""Successive halving: many candidates on few images, what survives on more, and on the clock."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from tokenenv.game.latency import LatencyTable, TimeCost, measure_decisions
from tokenenv.game.policy import lengths_known, play
from tokenenv.measure.candidate import Candidate, MethodCandidate, Run
from tokenenv.measure.certify import Pairs
from tokenenv.measure.speed import DENSE, fresh_batches, in_turns, pool_size
from tokenenv.reducers import DiffRate
from tokenenv.tuning.rates import RateSearch, word_of
from tokenenv.tuning.state import State
from tokenenv.tuning.trials import Reference, Trial, expected_losses, front_first
from tokenenv.vit.backbone import Backbone

FIRST = 64
"""Images that every candidate runs on."""

SURVIVORS = 12
"""Candidates that run on all choosing images."""

_TOGETHER, _ROUNDS, _LONG = 6, 3, 0.25
"""Candidates that are timed in turns with the dense model, timings of each, seconds of one."""

_DAMAGE, _PER_POINT, _SEARCHED = 0.1, 0.04, 150.0
"""When a path of rates ends: its divergence, nats, more for each point of budget; seconds."""

_STEPS = tuple(i / 100 for i in range(6, 61, 3))
"""Shares of the time that rates are taken at from the greedy path."""


class Search:
    """A search in progress; every result is saved as soon as it is known.

    Args:
        backbone: the dense model, in the precision that candidates run in.
        reference: what the dense model says of the choosing images.
        state: what is known already.
        table: the times of the backbone's parts at the batch size.
        budget: top-1 that may be lost, percentage points.
        compiled: whether the best are compiled in the end. The eager clock then says little of
            those that compile as one graph, whose decisions cost less: the table's limit ranks
            them.
        clock: whether :meth:`halve` and :meth:`complete` time candidates; else the table's limit
            ranks them all.

    Attributes:
        backbone, reference, state, table, budget, compiled, clock: as given.
        batch: images per pass on the clock.
    """

    def __init__(
        self,
        backbone: Backbone,
        reference: Reference,
        state: State,
        table: LatencyTable,
        budget: float,
        compiled: bool = False,
        clock: bool = True,
    ) -> None:
        self.backbone, self.reference, self.state = backbone, reference, state
        self.table, self.budget, self.batch = table, budget, table.batch
        self.compiled, self.clock = compiled, clock

    def halve(self, candidates: Sequence[MethodCandidate]) -> list[MethodCandidate]:
        """The candidates that are best in speed and divergence, tried on all choosing images.

        First all run on few images. The table of times tells how fast each could be at most, and
        the better half is timed. A quarter of the number runs on four times as many images, and
        what is left on all.
        """
        count = len(candidates)
        left = self._best(self._try(candidates, FIRST), max(count // 2, 2 * SURVIVORS))
        print(f"{count} candidates on {FIRST} images and by the table of times: {len(left)} left")
        if self.clock:
            self.time(left)
            left = self._best(left, max(count // 4, SURVIVORS))
            print(f"on the clock: {len(left)} left")
        left = self._best(self._try(left, 4 * FIRST), SURVIVORS)
        print(f"on {4 * FIRST} images: {len(left)} left")
        return self._try(left, len(self.reference))

    def complete(self, candidates: Sequence[MethodCandidate]) -> list[MethodCandidate]:
        """The same candidates, timed and tried on all choosing images, however they are."""
        if self.clock:
            self.time(candidates)
        return self._try(candidates, len(self.reference))

    def _try(self, candidates: Sequence[MethodCandidate], count: int) -> list[MethodCandidate]:
        """Try candidates on the first ``count`` images."""
        count = min(count, len(self.reference))
        with _bar(len(candidates), f"{count} images", "method") as bar:
            for candidate in candidates:
                known = self.state.trials.get(candidate.what, Trial(candidate.what))
                if known.images < count:
                    found = self.reference.extend(known, candidate, count, self.table)
                    self.state.trials[candidate.what] = found
                    self.state.save()
                bar.update()
        return list(candidates)

    def _best(self, candidates: Sequence[MethodCandidate], count: int) -> list[MethodCandidate]:
        """At most ``count`` of them: those with a prospect, by layers of the front."""
        named = {candidate.what: candidate for candidate in candidates}
        trials = [self.state.trials[what] for what in named]
        hopeful = [t for t in trials if t.speed > 1 and not hopeless(t.pairs, self.budget)]
        return [named[trial.what] for trial in front_first(hopeful)[:count]]

    def time(self, candidates: Sequence[MethodCandidate]) -> None:
        """Time those that were not, a few at a time in turns with the dense model."""
        due = [
            each
            for each in candidates
            if self._speedup(each) is None
            and not (self.compiled and lengths_known(self.backbone, each.method))
        ]
        if not due:
            return
        backbone = self.backbone
        images = self.reference.images(pool_size(self.batch))
        images = images.to(backbone.device, backbone.dtype)
        fresh = fresh_batches(images, self.batch)
        with _bar(len(due), "on the clock", "method") as bar, torch.inference_mode():
            for start in range(0, len(due), _TOGETHER):
                group = due[start : start + _TOGETHER]
                runs: dict[str, Run] = {each.what: _run(each) for each in group}
                runs[DENSE] = backbone
                for run in runs.values():
                    run(next(fresh))
                begun = time.perf_counter()
                backbone(next(fresh))
                passes = max(1, math.ceil(_LONG / (time.perf_counter() - begun)))
                took = in_turns(runs, fresh, _ROUNDS, passes, backbone.device)
                for each in group:
                    speedup = float(np.median(took[DENSE] / took[each.what]))
                    known = self.state.trials.get(each.what, Trial(each.what))
                    self.state.trials[each.what] = replace(known, speedup=speedup)
                self.state.save()
                bar.update(len(group))

    def _speedup(self, candidate: MethodCandidate) -> float | None:
        known = self.state.trials.get(candidate.what)
        return None if known is None else known.speedup

    def rates(self, count: int = FIRST) -> list[str]:
        """Words of DiffRate's rates along a greedy path over predicted time.

        Empty for a model without a class token, whose attention DiffRate reads.
        """
        if "rates" in self.state.found:
            return [str(word) for word in self.state.found["rates"]]
        backbone = self.backbone
        if not backbone.has_class_token:
            return []
        step = max(1, backbone.patches // 24)
        everywhere = DiffRate(
            tuple(range(backbone.depth)), (step,) * backbone.depth, (step,) * backbone.depth
        )
        decisions = measure_decisions(backbone, self.table, everywhere, budget=5.0)
        cost = TimeCost(backbone, self.table, decisions)
        images = self.reference.images(count).to(backbone.device, backbone.dtype)
        dense = self.reference.log_probs[: len(images)].to(backbone.device)
        search, found = RateSearch(backbone, images, dense, cost), dict[float, str]()
        begun = time.perf_counter()
        with _bar(round(100 * _STEPS[-1]), "schedules", "%") as bar, torch.inference_mode():
            for rates, outcome in search.path(step, sizes=(1, 2, 5), last=_STEPS[-1]):
                bar.update(max(0, min(round(100 * outcome.saving), bar.total) - bar.n))
                level = max((s for s in _STEPS if outcome.saving >= s), default=None)
                if level is not None and level not in found:
                    found[level] = word_of(rates)
                late = time.perf_counter() - begun > _SEARCHED
                if late or outcome.damage > _DAMAGE + _PER_POINT * self.budget:
                    break
        if found:  # else a busy machine had no time for the first ones: another run tries again
            self.state.found["rates"] = list(found.values())
            self.state.save()
        return list(found.values())

    def expected(self) -> dict[str, float]:
        """The top-1 that each candidate tried on all choosing images is expected to lose."""
        full = [t for t in self.state.trials.values() if t.images == len(self.reference)]
        return dict(zip((t.what for t in full), expected_losses(full), strict=True))

    def ladder(self, candidates: Sequence[Candidate], most: int = 4) -> list[str]:
        """The candidates to verify, from the safest on, each faster than the one before.

        They are those that are expected to stay within the budget, the ``most - 1`` fastest and the
        one of least divergence; if there are none, the one of least divergence that is faster than
        the dense model.
        """
        expected = self.expected()
        trials = [self.state.trials[c.what] for c in candidates if c.what in expected]
        faster = sorted((t for t in trials if t.speed > 1), key=lambda t: t.divergence)
        front: list[Trial] = []
        for trial in faster:
            if not front or trial.speed > front[-1].speed:
                front.append(trial)
        within = [t.what for t in front if expected[t.what] <= self.budget]
        if not within:
            return [t.what for t in front[:1]]
        return list(dict.fromkeys([within[0], *within[-(most - 1) :]]))


def hopeless(pairs: Pairs, budget: float) -> bool:
    """Whether even the least loss that the images allow (at 95 %) is over the budget, points."""
    share = pairs.lost / 100
    spread = math.sqrt(max((pairs.wins + pairs.losses) / pairs.images - share**2, 0.0))
    return pairs.lost - 164.5 * spread / math.sqrt(pairs.images) > budget


def _run(candidate: MethodCandidate) -> Run:
    method, backbone = copy.deepcopy(candidate.method), candidate.backbone
    return lambda images: play(backbone, method, images, only_logits=True).logits


@contextmanager
def _bar(total: int, label: str, unit: str) -> Iterator[Any]:
    """A progress bar with the time left."""
    with tqdm(total=total, desc=label, unit=unit, leave=False, disable=None) as bar:
        yield bar
