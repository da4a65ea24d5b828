"""How much faster a policy makes a model, and how much faster its token counts could make it."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokenenv.game.cost import Cost
from tokenenv.game.episode import Execution
from tokenenv.game.policy import Method, play
from tokenenv.measure.evaluation import dense_macs, macs_of, model_macs
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.load import Dense

DENSE = "dense"
_SHORTEST = 0.25


@dataclass(frozen=True)
class Speed:
    """One model at one batch size.

    Attributes:
        what: the policy, or ``dense``.
        batch: images per forward pass.
        images_per_s: median over the rounds.
        speedup: time of the dense model over this one's in the same round, median;
            ``speedup_q25``, ``speedup_q75``: the quartiles.
        speedup_q25: lower quartile.
        speedup_q75: upper quartile.
        gmacs: 10^9 multiply-adds per image, policy included (1 MAC = 1 FLOP).
        gmacs_dense: those of the dense model.
        peak_mib: the most memory that one forward pass held at a time, weights and images
            apart, in MiB.
        slice_speedup: ``speedup`` of :func:`sliced`, the limit of what these token counts give.
            None where there is no such limit: for a model that merges by itself.
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

    def as_json(self) -> dict[str, Any]:
        """All attributes."""
        return asdict(self)


@torch.inference_mode()
def bench(
    backbone: Backbone | Dense,
    policies: Mapping[str, Method],
    images: Tensor,
    *,
    backbones: Mapping[str, Backbone] | None = None,
    models: Mapping[str, nn.Module] | None = None,
    rounds: int = 7,
    compiled: bool = False,
    execution: Execution | None = None,
    progress: Callable[[int], object] = lambda n: None,
) -> list[Speed]:
    """Time the dense model, each policy and each sliced model in turns.

    All run once in every round, in an order that changes from round to round, so that ratios
    within a round stay fair on a machine with other work; small batches several times in a row, so
    that no timing is shorter than a quarter of a second. A policy draws the same numbers in each
    pass.

    Args:
        backbone: the dense model; a ``Backbone`` where a policy plays on it.
        policies: by name; those that fit the backbone.
        images: ``(B, C, H, W)``, normalised, on the backbone's device.
        backbones: by name, of those policies that do not play on ``backbone``, such as a copy that
            was fine-tuned with the policy.
        models: by name, models in eval mode that lose tokens by themselves, such as LTM's.
        rounds: how often each is timed, after two untimed passes.
        compiled: whether ``torch.compile`` works on all of them: on the dense and the sliced models
            as a whole, on what a block does to each token where a policy plays.
        execution: how policies are played, see :class:`~tokenenv.game.episode.Episode`; None takes
            what suits the device.
        progress: called with the number of timings done since.

    Returns:
        The dense model, then each policy, then each model.
    """
    device = backbone.device
    compile_: Any = torch.compile if compiled else lambda run: run
    dense = compile_(lambda: backbone(images))
    runs: dict[str, Callable[[], Any]] = {DENSE: lambda: dense}
    shape = images.shape[1:]
    gmacs = {DENSE: dense_macs(backbone, shape) / 1e9}
    for what, policy in policies.items():
        own = (backbones or {}).get(what, backbone)
        assert isinstance(own, Backbone)
        player = copy.copy(own)
        player.compiled = compiled
        episode = play(own, copy.deepcopy(policy), images)
        gmacs[what] = macs_of(episode, policy, Cost(own)).mean().item() / 1e9
        runs[what] = _player(player, policy, images, execution)
        counts = [_means(part) for part in (episode.attended, episode.fed)]
        runs[_slice_of(what)] = _slicer(compile_, own, images, counts)
    for what, model in (models or {}).items():
        gmacs[what] = model_macs(model, shape) / 1e9
        runs[what] = _whole(compile_, model, images)
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

    def speed(what: str) -> Speed:
        low, middle, high = np.quantile(took[DENSE] / took[what], [0.25, 0.5, 0.75]).tolist()
        cut = took[DENSE] if what == DENSE else took.get(_slice_of(what))
        limit = None if cut is None else np.median(took[DENSE] / cut).item()
        return Speed(
            what=what,
            batch=len(images),
            images_per_s=len(images) / np.median(took[what]).item(),
            speedup=middle,
            speedup_q25=low,
            speedup_q75=high,
            gmacs=gmacs[what],
            gmacs_dense=gmacs[DENSE],
            peak_mib=peak[what],
            slice_speedup=limit,
            realised_share=None if limit is None else middle / limit,
        )

    return [speed(what) for what in gmacs]


def timings(policies: int, rounds: int, models: int = 0) -> int:
    """How many timings :func:`bench` reports to ``progress``, the untimed passes counted as one."""
    return (1 + 2 * policies + models) * (rounds + 1)


def sliced(backbone: Backbone, images: Tensor, attended: list[int], fed: list[int]) -> Tensor:
    """The dense model with its token tensor cut: what given token counts cost at the least.

    Nobody decides, nothing is gathered: the last tokens fall off. The logits mean nothing.

    Args:
        backbone: the model.
        images: ``(B, C, H, W)``.
        attended: for each block how many tokens its attention works on, prefix included.
        fed: the same for its MLP.

    Returns:
        ``(B, classes)``.
    """
    tokens = backbone.embed(images)
    for block in range(backbone.depth):
        tokens, _ = backbone.attend(block, tokens.with_x(tokens.x[:, : attended[block]]))
        tokens = backbone.feed(block, tokens.with_x(tokens.x[:, : fed[block]]))
    return backbone.classify(tokens)


def _slice_of(what: str) -> str:
    return f"{what}, sliced"


def _player(
    backbone: Backbone, policy: Method, images: Tensor, execution: Execution | None
) -> Callable[[], Any]:
    def ready() -> Callable[[], Any]:
        fresh = copy.deepcopy(policy)  # outside of the time
        return lambda: play(backbone, fresh, images, execution)

    return ready


def _whole(compile_: Any, model: nn.Module, images: Tensor) -> Callable[[], Any]:
    run = compile_(lambda: model(images))
    return lambda: run


def _means(counts: list[Tensor]) -> list[int]:
    return [round(n.double().mean().item()) for n in counts]


def _slicer(
    compile_: Any, backbone: Backbone, images: Tensor, counts: list[list[int]]
) -> Callable[[], Any]:
    run = compile_(lambda: sliced(backbone, images, *counts))
    return lambda: run


def _seconds(ready: Callable[[], Any], device: torch.device, passes: int) -> float:
    """Seconds of one pass, a mean."""
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
    """The most memory that ``run()`` held at a time beside what was there before, in MiB."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    from torch.autograd.profiler import MEMORY_EVENT_NAME
    from torch.profiler import ProfilerActivity, profile

    # Where there is no GPU the profiler complains about that on every start.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = profiled.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == MEMORY_EVENT_NAME]
    held = np.cumsum([size for _, size in sorted(changes)])
    return float(held.max(initial=0)) / 2**20
