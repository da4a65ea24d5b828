"""Speed-up of methods over the dense model, and the speed-up their token counts allow."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenenv.game.episode import Execution
from tokenenv.measure.candidate import Candidate, Run, Timing
from tokenenv.measure.evaluation import dense_macs
from tokenenv.vit.dense import Dense

DENSE = "dense"
F = TypeVar("F", bound=Hashable)
Compiled = Literal["none", "dense", "all"]
"""What is also timed as compiled by ``torch.compile``."""

_SHORTEST = 0.25
"""Least duration of one timing, seconds."""


@dataclass(frozen=True)
class Speed:
    """One model at one batch size.

    Attributes:
        what: the candidate, or ``dense``.
        batch: images per forward pass.
        dtype: precision of the model.
        compiled: whether it ran through ``torch.compile``.
        runtime: ``torch``, or what else it ran in.
        images_per_s: median over the rounds.
        speedup: time of the dense model in its fastest form over this one's in the same round,
            median.
        speedup_q25, speedup_q75: its quartiles.
        gmacs: 10^9 multiply-adds per image that are executed, policy included (1 MAC = 1 FLOP).
        gmacs_dense: those of the dense model, its last block in full.
        peak_mib: peak memory that torch allocates in one forward pass, without weights and images,
            MiB; ONNX Runtime's is not known.
        slice_speedup: ``speedup`` of :func:`~tokenenv.measure.candidate.sliced` in its fastest
            form, the limit that these token counts set; None for a model that merges its own
            tokens.
        realised_share: ``speedup / slice_speedup``, or None.
        compile_s: seconds of the first pass of the compiled form, compilation included; 0 of the
            others.
    """

    what: str
    batch: int
    dtype: str
    compiled: bool
    images_per_s: float
    speedup: float
    speedup_q25: float
    speedup_q75: float
    gmacs: float
    gmacs_dense: float
    peak_mib: float
    slice_speedup: float | None
    realised_share: float | None
    compile_s: float
    runtime: str = "torch"

    @property
    def saved(self) -> float:
        """Multiply-adds saved, percent."""
        return 100 * (1 - self.gmacs / self.gmacs_dense)

    @property
    def name(self) -> str:
        """What it is, and how it ran if that was in another way than torch's own."""
        if self.runtime != "torch" and self.what == DENSE:  # others are named by it
            return f"{self.what}, {self.runtime}"
        return f"{self.what}, compiled" if self.compiled else self.what

    def to_dict(self) -> dict[str, Any]:
        """All attributes by name, as JSON."""
        return asdict(self)


class _Form(NamedTuple):
    """One thing to time: the model ``what``, or the model cut to its counts (``limit``)."""

    what: str
    compiled: bool
    limit: bool = False
    runtime: str = "torch"
    dtype: str | None = None  # None: the dense model's


@torch.inference_mode()
def bench(
    dense: Dense,
    candidates: Sequence[Candidate],
    images: Tensor,
    *,
    batch: int | None = None,
    rounds: int = 7,
    compiled: Compiled = "none",
    execution: Execution | None = None,
    dense_forms: Mapping[str, Run] = {},
    progress: Callable[[int], object] = lambda n: None,
) -> list[Speed]:
    """Time the dense model, each candidate and each one's limit in turns, on fresh batches.

    All run once in every round, in an order that changes from round to round, so that other work
    on the machine affects them alike. In a round all get the same batches, and every pass gets
    another one: images are drawn without repetition until all had their turn, then in a new order.
    A method that gives each image a length of its own meets new lengths in every batch, as in use.
    Small batches run several times in a row, so that no timing is shorter than a quarter of a
    second.

    Args:
        dense: the dense model.
        candidates: on its device and in its dtype; their names differ.
        images: ``(n, C, H, W)`` the images to draw from, normalised, on that device;
            :func:`pool_size` of them are used.
        batch: images per forward pass; None: all.
        rounds: number of timings of each, after two untimed passes.
        compiled: what is also timed as compiled by ``torch.compile``: ``none``, the ``dense`` model
            or ``all``. The speed-up is over the fastest form of the dense model.
        dense_forms: other forms of the dense model in float32 to time, by their runtime.
        execution: how methods run, see :class:`~tokenenv.game.episode.Episode`; None: the
            device's default.
        progress: called with the number of timings done since the last call.

    Returns:
        The rows of the dense model, then those of the candidates.
    """
    device, size = dense.device, batch or len(images)
    images = images[: pool_size(size)]
    runs, gmacs = _forms(dense, candidates, images, compiled, execution, dense_forms)
    fresh = fresh_batches(images, size)
    peak, took_first = {}, {}
    for form, run in runs.items():
        start = time.perf_counter()
        run(next(fresh))
        _wait(device)
        took_first[form] = time.perf_counter() - start if form.compiled else 0.0
        peak[form] = _peak_mib(lambda run=run: run(next(fresh)), device)  # type: ignore[misc]
        progress(1)
    passes = max(
        1, math.ceil(_SHORTEST / _seconds(runs[_Form(DENSE, False)], [next(fresh)], device))
    )
    took = in_turns(runs, fresh, rounds, passes, device, progress)
    best = min((took[form] for form in took if form.what == DENSE), key=np.median)
    return [
        _speed(form, size, took, best, gmacs, peak[form], took_first[form], dense)
        for form in runs
        if not form.limit
    ]


@torch.inference_mode()
def in_turns(
    runs: Mapping[F, Run],
    fresh: Iterator[Tensor],
    rounds: int,
    passes: int,
    device: torch.device,
    progress: Callable[[int], object] = lambda n: None,
) -> dict[F, NDArray[np.float64]]:
    """Time forward passes in turns, in an order that changes from round to round.

    Args:
        runs: one forward pass each.
        fresh: gives batches, of which all get the same ones in a round.
        rounds: number of timings of each.
        passes: batches in a row for a timing.
        device: where they run.
        progress: called with 1 after each timing.

    Returns:
        For each ``(rounds,)`` mean seconds of a pass.
    """
    seconds: dict[F, list[float]] = {form: [] for form in runs}
    for turn in range(rounds):
        forms, batches = list(runs), [next(fresh) for _ in range(passes)]
        start_at = turn % len(forms)
        for form in forms[start_at:] + forms[:start_at]:
            seconds[form].append(_seconds(runs[form], batches, device))
            progress(1)
    return {form: np.array(values) for form, values in seconds.items()}


def _forms(
    dense: Dense,
    candidates: Sequence[Candidate],
    images: Tensor,
    compiled: Compiled,
    execution: Execution | None,
    dense_forms: Mapping[str, Run],
) -> tuple[dict[_Form, Run], dict[str, float]]:
    """The forward passes to time, and the multiply-adds of each model, 10^9 per image."""
    if compiled != "none":
        torch.compiler.reset()  # the number of graphs per function is limited
        # It warns of a CUDA toolkit on a machine without a GPU.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    timings = {each.what: each.timing(images, execution) for each in candidates}
    runs: dict[_Form, Run] = {_Form(DENSE, False): dense}
    gmacs = {DENSE: dense_macs(dense, images.shape[1:]) / 1e9}
    if compiled != "none":
        runs[_Form(DENSE, True)] = torch.compile(dense.model, dynamic=False)
    for forms in (dense_forms, *(timing.dense for timing in timings.values())):
        for runtime, run in forms.items():
            runs.setdefault(_Form(DENSE, False, runtime=runtime, dtype="float32"), run)
    for what, timing in timings.items():
        gmacs[what], runs[_plain(what, timing)] = timing.gmacs, timing.run
        if timing.limit is not None:
            runs[_Form(what, False, True)] = timing.limit
        if compiled == "all" and timing.compiled is not None:
            runs[_Form(what, True)] = timing.compiled()
            if timing.limit is not None:
                runs[_Form(what, True, True)] = torch.compile(timing.limit, dynamic=False)
    return runs, gmacs


def _plain(what: str, timing: Timing) -> _Form:
    return _Form(what, False, runtime=timing.runtime, dtype=timing.dtype)


def pool_size(batch: int) -> int:
    """How many images batches are drawn from: eight batches, within 64 and 512 images."""
    return max(batch, min(max(8 * batch, 64), 512))


def fresh_batches(images: Tensor, size: int) -> Iterator[Tensor]:
    """Batches ``(size, C, H, W)`` without end; an image comes again when all had their turn."""
    generator = torch.Generator().manual_seed(0)
    waiting = torch.empty(0, dtype=torch.int64)
    while True:
        while len(waiting) < size:
            order = torch.randperm(len(images), generator=generator)
            waiting = torch.cat([waiting, order])
        index, waiting = waiting[:size], waiting[size:]
        yield images[index.to(images.device)]


def _speed(
    form: _Form,
    batch: int,
    took: dict[_Form, Any],
    best: Any,
    gmacs: dict[str, float],
    peak_mib: float,
    first: float,
    dense: Dense,
) -> Speed:
    """A row from the seconds of every round; ``best``: those of the dense model's fastest form."""
    low, middle, high = np.quantile(best / took[form], [0.25, 0.5, 0.75]).tolist()
    cuts = [took[other] for other in took if other.what == form.what and other.limit]
    limit = None
    if form.what == DENSE:
        limit = 1.0
    elif cuts:
        limit = np.median(best / min(cuts, key=np.median)).item()
    return Speed(
        what=form.what,
        batch=batch,
        dtype=form.dtype or str(dense.dtype).removeprefix("torch."),
        compiled=form.compiled,
        images_per_s=batch / np.median(took[form]).item(),
        speedup=middle,
        speedup_q25=low,
        speedup_q75=high,
        gmacs=gmacs[form.what],
        gmacs_dense=gmacs[DENSE],
        peak_mib=peak_mib,
        slice_speedup=limit,
        realised_share=None if limit is None else middle / limit,
        compile_s=first,
        runtime=form.runtime,
    )


def timings(candidates: Sequence[Candidate], rounds: int, compiled: Compiled = "none") -> int:
    """Upper bound of the number of timings that :func:`bench` reports to ``progress``."""
    forms = {"none": 1, "dense": 2, "all": 2}[compiled]  # an ONNX file has one of dense, no limit
    return (forms + 2 * len(candidates) * (1 + (compiled == "all"))) * (rounds + 1)


def _seconds(run: Run, batches: Sequence[Tensor], device: torch.device) -> float:
    """Mean seconds of one forward pass over the passes of some batches in a row."""
    _wait(device)
    start = time.perf_counter()
    for images in batches:
        run(images)
    _wait(device)
    return (time.perf_counter() - start) / len(batches)


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
