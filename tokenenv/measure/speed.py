"""Speed-up of methods over the dense model, and the speed-up their token counts allow."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenenv.game.episode import Execution
from tokenenv.measure.candidate import Candidate, Run, compiled_if
from tokenenv.measure.evaluation import dense_macs
from tokenenv.vit.dense import Dense

DENSE = "dense"
_SHORTEST = 0.25
"""Least duration of one timing, seconds."""


@dataclass(frozen=True)
class Speed:
    """One model at one batch size.

    Attributes:
        what: the candidate, or ``dense``.
        batch: images per forward pass.
        images_per_s: median over the rounds.
        speedup: time of the dense model over this one's in the same round, median.
        speedup_q25, speedup_q75: its quartiles.
        gmacs: 10^9 multiply-adds per image, policy included (1 MAC = 1 FLOP).
        gmacs_dense: those of the dense model.
        peak_mib: peak memory of one forward pass without weights and images, MiB.
        slice_speedup: ``speedup`` of :func:`~tokenenv.measure.candidate.sliced`, the limit that
            these token counts set; None for a model that merges its own tokens.
        realised_share: ``speedup / slice_speedup``, or None.
    """

    what: str
    batch: int
    images_per_s: float
    speedup: float
    speedup_q25: float
    speedup_q75: float
    gmacs: float
    gmacs_dense: float
    peak_mib: float
    slice_speedup: float | None
    realised_share: float | None

    @property
    def saved(self) -> float:
        """Multiply-adds saved, percent."""
        return 100 * (1 - self.gmacs / self.gmacs_dense)

    def to_dict(self) -> dict[str, Any]:
        """All attributes by name, as JSON."""
        return asdict(self)


@torch.inference_mode()
def bench(
    dense: Dense,
    candidates: Sequence[Candidate],
    images: Tensor,
    *,
    rounds: int = 7,
    compiled: bool = False,
    execution: Execution | None = None,
    progress: Callable[[int], object] = lambda n: None,
) -> list[Speed]:
    """Time the dense model, each candidate and each one's limit in turns.

    All run once in every round, in an order that changes from round to round, so that other work
    on the machine affects them alike. Small batches run several times in a row, so that no timing
    is shorter than a quarter of a second. A random candidate draws the same numbers in each pass.

    Args:
        dense: the dense model.
        candidates: on its device and in its dtype; their names differ.
        images: ``(B, C, H, W)``, normalised, on that device.
        rounds: number of timings of each, after two untimed passes.
        compiled: whether to use ``torch.compile`` for all of them, see
            :meth:`~tokenenv.measure.candidate.Candidate.timing`.
        execution: how methods run, see :class:`~tokenenv.game.episode.Episode`; None: the
            device's default.
        progress: called with the number of timings done since the last call.

    Returns:
        The row of the dense model, then those of the candidates.
    """
    device = dense.device
    whole = compiled_if(compiled, lambda: dense(images))
    runs: dict[str, Callable[[], Run]] = {DENSE: lambda: whole}
    gmacs = {DENSE: dense_macs(dense, images.shape[1:]) / 1e9}
    for candidate in candidates:
        timing = candidate.timing(images, compiled, execution)
        gmacs[candidate.what], runs[candidate.what] = timing.gmacs, timing.ready
        if timing.limit is not None:
            runs[_limit_of(candidate.what)] = timing.limit
    peak = {}
    for name, ready in runs.items():
        ready()()
        peak[name] = _peak_mib(ready(), device)
        progress(1)
    passes = max(1, math.ceil(_SHORTEST / _seconds(runs[DENSE], device, 1)))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        names = list(runs)
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            seconds[name].append(_seconds(runs[name], device, passes))
            progress(1)
    took = {name: np.array(values) for name, values in seconds.items()}
    return [_speed(what, len(images), took, gmacs, peak[what]) for what in gmacs]


def _speed(
    what: str, batch: int, took: dict[str, Any], gmacs: dict[str, float], peak_mib: float
) -> Speed:
    """A row from the seconds of every round, by name of the forward pass."""
    low, middle, high = np.quantile(took[DENSE] / took[what], [0.25, 0.5, 0.75]).tolist()
    cut = took[DENSE] if what == DENSE else took.get(_limit_of(what))
    limit = None if cut is None else np.median(took[DENSE] / cut).item()
    return Speed(
        what=what,
        batch=batch,
        images_per_s=batch / np.median(took[what]).item(),
        speedup=middle,
        speedup_q25=low,
        speedup_q75=high,
        gmacs=gmacs[what],
        gmacs_dense=gmacs[DENSE],
        peak_mib=peak_mib,
        slice_speedup=limit,
        realised_share=None if limit is None else middle / limit,
    )


def timings(candidates: Sequence[Candidate], rounds: int) -> int:
    """Upper bound of the number of timings that :func:`bench` reports to ``progress``."""
    return (1 + 2 * len(candidates)) * (rounds + 1)


def _limit_of(what: str) -> str:
    return f"{what}, sliced"


def _seconds(ready: Callable[[], Any], device: torch.device, passes: int) -> float:
    """Mean seconds of one forward pass over ``passes`` in a row."""
    runs = [ready() for _ in range(passes)]
    _wait(device)
    start = time.perf_counter()
    for run in runs:
        run()
    _wait(device)
    return (time.perf_counter() - start) / passes


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_mib(run: Callable[[], Any], device: torch.device) -> float:
    """Peak memory that ``run()`` allocates beyond what was allocated before, MiB."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    from torch.autograd.profiler import MEMORY_EVENT_NAME
    from torch.profiler import ProfilerActivity, profile

    # Without a GPU the profiler warns on every start.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = profiled.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == MEMORY_EVENT_NAME]
    held = np.cumsum([size for _, size in sorted(changes)])
    return float(held.max(initial=0)) / 2**20
