"""Run the suite: train learners on tasks, and measure their policies on the test images."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tokenenv.errors import UserError
from tokenenv.measure.printing import report_skipped
from tokenenv.measure.state import conditions, fingerprint
from tokenenv.paths import as_path
from tokenenv.storage import own_folder, write_json
from tokenenv.suite.checks import HiddenImages, check_executions
from tokenenv.suite.learners import Learner, Means, find_learner
from tokenenv.suite.opened import (
    OpenTask,
    dense_hits,
    dense_predictions,
    open_task,
    read_points,
    sweep,
)
from tokenenv.suite.results import (
    RANDOM,
    Point,
    Result,
    Stage,
    check_conditions,
    read_result,
)
from tokenenv.suite.stages import Stages
from tokenenv.suite.tasks import POINTS, Task, find_task


def run_suite(
    tasks: Sequence[str],
    learners: Sequence[str],
    *,
    seeds: Sequence[int] | None = None,
    out: str | Path = "suite",
    test_data: str | None = None,
    means: Means | None = None,
) -> list[Path]:
    """Make the missing results, one per task, learner and seed; the command ``suite run``.

    Args:
        tasks: names of tasks.
        learners: names of learners, see :func:`~tokenenv.suite.learners.find_learner`.
        seeds: seeds to run; None: those of each task.
        out: folder of the results; existing results are kept.
        test_data: test photographs, for tasks that have no images of their own.
        means: resources for training, such as the device.

    Returns:
        The files of all results that were asked for.

    Raises:
        UserError: an argument is invalid, or a learner breaks a rule of the suite.
        KeyboardInterrupt: after Ctrl-C; results so far are kept.
    """
    chosen = [find_task(name) for name in dict.fromkeys(tasks)]
    found = [find_learner(name) for name in dict.fromkeys(learners)]
    means = means or Means()
    for task in chosen:
        for learner in found:
            learner.check(task)
    paths: list[Path] = []
    with own_folder(as_path(out, "out")):
        try:
            for task in chosen:
                opened = open_task(
                    task,
                    weights=means.weights,
                    data=means.data,
                    test_data=test_data,
                    device=means.device,
                )
                paths += _run_task(opened, found, Path(out), seeds, means)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("results so far are kept; the same command goes on") from None
    return paths


@dataclass(frozen=True)
class _Todo:
    """A missing result: its learner, seed, file and conditions."""

    learner: Learner
    seed: int
    path: Path
    conditions: dict[str, Any]


def _run_task(
    opened: OpenTask,
    learners: Sequence[Learner],
    out: Path,
    seeds: Sequence[int] | None,
    means: Means,
) -> list[Path]:
    """Make the missing results of a task; returns the files of all."""
    task, test = opened.spec, opened.test
    common = conditions(task.model, opened.backbone.model, test)
    todo = [
        _Todo(learner, seed, _place(out, task, learner, seed), now)
        for learner in learners
        for now in [_conditions(opened, common, learner, means)]
        for seed in _seeds(seeds, task, learner)
    ]
    missing = []
    for each in todo:
        if each.path.is_file():
            _print_result(_kept(each, means), "kept")
        else:
            missing.append(each)
    if missing:
        dense = dense_predictions(opened)
    for number, each in enumerate(missing, 1):
        # A run is only resumed under the same conditions.
        every = {"evaluate_every": means.evaluate_every} if means.evaluate_every else {}
        same = json.dumps(each.conditions | every, sort_keys=True)
        digest = hashlib.sha256(same.encode()).hexdigest()
        folder = out / "runs" / f"{each.path.stem}-{digest[:8]}"
        result = _run_one(opened, each, dense, folder, means)
        write_json(each.path, result.as_json())
        _print_result(result, f"{number}/{len(missing)}, {result.seconds:.0f} s")
    report_skipped(test)
    return [each.path for each in todo]


def _conditions(
    opened: OpenTask, common: dict[str, Any], learner: Learner, means: Means
) -> dict[str, Any]:
    """The conditions of a learner's results, see :class:`~tokenenv.suite.results.Result`.

    ``common``: those of model and test images.
    """
    now = {
        **common,
        "learnt_from": f"{opened.train.name}, {len(opened.train)} images",
        "task": opened.spec.settings(),
        "code": learner.code,
    }
    learnt_in = means.dtype if learner.trains else learner.learnt_in
    return now | ({"learnt_in": learnt_in} if learnt_in else {})


def _run_one(
    opened: OpenTask, todo: _Todo, dense: torch.Tensor, folder: Path, means: Means
) -> Result:
    """Train a learner and measure its policies."""
    learner, seed, now = todo.learner, todo.seed, todo.conditions
    task, start = opened.spec, time.perf_counter()
    opened.played, opened.learnt_in = 0, set()
    opened.stages = Stages(0 if learner.deterministic else means.evaluate_every)
    hidden: Any = HiddenImages(task.name)
    test, opened.test = opened.test, hidden
    try:
        policies = learner.learn(opened, seed, folder, means)
    finally:
        opened.test = test
    if hidden.asked:
        hidden.refuse()  # the learner went on after the refusal
    opened.check_budget()
    if fingerprint(opened.backbone.model.state_dict()) != now["weights"]:
        raise UserError(
            f"learner '{learner.name}' changed the weights of '{task.model}', which stay frozen in "
            "the suite: let it work on a copy"
        )
    for policy in policies.values():
        opened.check_policy(policy)
        if learner.name != RANDOM:
            check_executions(opened, policy.on(opened.backbone.device))
    words = f"{learner.name} seed {seed}"
    points = _measured(opened, policies, dense, words)
    curve = tuple(
        Stage(episodes, _without_images(_measured(opened, kept, dense, f"{words}, {episodes}")))
        for episodes, kept in sorted(opened.stages.kept.items())
    )
    result = Result(
        task.name,
        learner.name,
        seed,
        {"learnt_in": " and ".join(sorted(opened.learnt_in)) or "float32", **now},
        round(time.perf_counter() - start, 1),
        opened.backbone.classes,
        int((dense >= 0).sum()),
        dense_hits(opened, dense),
        points,
        {"versions": _versions(learner), "threads": torch.get_num_threads()}
        | {"settings": learner.settings(task)}
        | ({"evaluate_every": opened.stages.every} if opened.stages.every else {}),
        curve,
    )
    _ = result.areas  # raises for numbers that are not finite, before the result is written
    return result


def _measured(
    opened: OpenTask, policies: dict[str, Any], dense: torch.Tensor, words: str
) -> tuple[Point, ...]:
    """Points of a learner's policies on the test images, under a bar called ``words``."""
    for policy in policies.values():
        opened.check_policy(policy)
        policy.on(opened.backbone.device)
    only = next(iter(policies.values()))
    swept = len(policies) == 1 and only.adjustable
    images = len(opened.test) * (POINTS if swept else len(policies))
    with tqdm(total=images, unit="image", desc=words, leave=False, disable=None) as bar:
        if swept:
            return tuple(sweep(opened, only, dense, bar.update))
        return tuple(read_points(opened, policies, dense, bar.update))


def _without_images(points: Sequence[Point]) -> tuple[Point, ...]:
    """The points without the single images' outcomes, which would make files of curves large."""
    return tuple(replace(point, right="") for point in points)


def _versions(learner: Learner) -> dict[str, str]:
    """Versions of Python and of the libraries that results depend on."""
    libraries = ["torch", "timm", "numpy", *([learner.library] if learner.library else [])]
    return {"python": platform.python_version()} | {name: version(name) for name in libraries}


def replay(
    path: Path, *, test_data: str | None = None, means: Means | None = None
) -> tuple[Result, list[str]]:
    """Make a stored result again, from its learner and seed; the command ``suite validate``.

    Training is repeated, so it takes as long as the result says.

    Args:
        path: its file.
        test_data: test photographs, for tasks that have no images of their own.
        means: resources for training.

    Returns:
        The stored result, and in words what differs from it; empty if nothing does.

    Raises:
        UserError: the file was edited or is no result, its learner is unknown, or the conditions
            here are others.
    """
    stored, means = read_result(path), means or Means()
    task, learner = find_task(stored.task), find_learner(stored.learner)
    learner.check(task)
    given = {"weights": means.weights, "data": means.data, "device": means.device}
    opened = open_task(task, test_data=test_data, **given)  # type: ignore[arg-type]
    common = conditions(task.model, opened.backbone.model, opened.test)
    now = _conditions(opened, common, learner, means)
    check_conditions(stored, now, path)
    means = replace(means, evaluate_every=stored.made.get("evaluate_every", 0))
    with tempfile.TemporaryDirectory() as folder:
        todo = _Todo(learner, stored.seed, path, now)
        again = _run_one(opened, todo, dense_predictions(opened), Path(folder), means)
    return stored, _differences(stored, again)


def _differences(stored: Result, again: Result) -> list[str]:
    """What differs between two results of a learner and seed, but for their duration."""
    found = []
    here, there = again.as_json()["made"], stored.made  # as it is read: tuples become lists
    for key in sorted(here.keys() | there.keys()):
        if here.get(key) != there.get(key):
            found.append(f"{key}: {there.get(key)} stored, {here.get(key)} now")
    found += _different_points(stored.points, again.points, "")
    stages = [[stage.episodes for stage in result.curve] for result in (stored, again)]
    if stages[0] != stages[1]:
        found.append(f"the curve: stages after {stages[0]} episodes stored, {stages[1]} now")
    for old, new in zip(stored.curve, again.curve, strict=False):
        found += _different_points(old.points, new.points, f"after {old.episodes} episodes, ")
    if stored.dense != again.dense:
        found.append("the dense model's predictions")
    return found


def _different_points(stored: Sequence[Point], now: Sequence[Point], where: str) -> list[str]:
    found = []
    if len(stored) != len(now):
        found.append(f"{where}{len(stored)} points stored, {len(now)} now")
    for old, new in zip(stored, now, strict=False):
        if old != new:
            found.append(
                f"{where}{old.knob}: {100 * old.top1:.3f} % at a cost of {old.macs:.6f} stored, "
                f"{new.knob}: {100 * new.top1:.3f} % at {new.macs:.6f} now"
            )
    return found


def _seeds(asked: Sequence[int] | None, task: Task, learner: Learner) -> Sequence[int]:
    if learner.deterministic:
        return [0]
    return asked if asked is not None else list(range(task.seeds))


def _place(out: Path, task: Task, learner: Learner, seed: int) -> Path:
    name = re.sub(r"[^\w.-]+", "_", learner.name)
    return out / "results" / task.name / f"{task.name}-{name}-{seed}.json"


def _kept(todo: _Todo, means: Means) -> Result:
    """An existing result.

    Raises:
        UserError: it can't be read, is of another learner or of other conditions, or has no curve
            and one is asked for.
    """
    path, learner = todo.path, todo.learner
    result = read_result(path)
    if result.learner != learner.name:
        raise UserError(
            f"'{path}' holds learner '{result.learner}', not '{learner.name}': give another --out"
        )
    check_conditions(result, todo.conditions, path)
    every, asked = result.made.get("evaluate_every", 0), means.evaluate_every
    if asked and every != asked and not learner.deterministic:
        raise UserError(
            f"'{path}' was made with --evaluate-every {every or 'left out'} and now it is {asked}: "
            "remove it to run it again, or give another --out"
        )
    return result


def _print_result(result: Result, note: str) -> None:
    print(
        f"{result.task} {result.learner} seed {result.seed}: top-1 {100 * result.area:.2f} % over "
        f"the range, {100 * result.saved():.1f} % saved within a point ({note})",
        flush=True,
    )
