"""Turn results into scores, a Markdown table, and the layout that marl-eval reads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokenenv._version import __version__
from tokenenv.errors import UserError
from tokenenv.suite.results import HEURISTIC, RANDOM, Result, references, unpack_hits
from tokenenv.suite.score import (
    Front,
    Interval,
    aggregate,
    hull,
    improvement,
    normalised,
    oracle_front,
)
from tokenenv.suite.tasks import TASKS, Task, find_task

_SAME = ("weights", "images", "files")
"""Conditions that all results of one task must share, beside its settings."""

_LEARNT = ("code", "learnt_in", "learnt_from")
"""Conditions that all results of one learner on a task must share."""


@dataclass(frozen=True)
class Yardstick:
    """The scale of a task's scores: the area of random, score 0, and the oracle's front, 1."""

    random: float
    oracle: Front
    oracle_area: float


@dataclass(frozen=True)
class Row:
    """One learner on one task.

    Attributes:
        task, learner: the names.
        results: one for each seed.
        scores: the score of each result.
        interval: interquartile mean and interval of the scores.
        reference: whether the results come with the package.
        curve: after how many episodes all seeds were measured, and the interval of their scores;
            the last is :attr:`interval`. Empty if no stage of the training was measured.
    """

    task: Task
    learner: str
    results: tuple[Result, ...]
    scores: tuple[float, ...]
    interval: Interval
    reference: bool
    curve: tuple[tuple[int, Interval], ...] = ()

    @property
    def label(self) -> str:
        """The learner's name; of a reference with the package version that made it."""
        if not self.reference:
            return self.learner
        return f"{self.learner} (reference {self.results[0].version})"


@dataclass(frozen=True)
class Report:
    """Scored results.

    Attributes:
        rows: sorted by task in the suite's order, then by score, the best last.
        yardsticks: by the task's name.
        notes: remarks for the reader, one line each.
    """

    rows: tuple[Row, ...]
    yardsticks: dict[str, Yardstick]
    notes: tuple[str, ...]

    @property
    def tasks(self) -> list[Task]:
        """The tasks with rows."""
        return list(dict.fromkeys(row.task for row in self.rows))

    def of(self, task: Task) -> list[Row]:
        """The rows of a task."""
        return [row for row in self.rows if row.task is task]

    def overall(self) -> dict[str, tuple[list[str], Interval]]:
        """For each learner its tasks and the aggregate score over them."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.label, []).append(row)
        return {
            label: ([row.task.name for row in rows], aggregate([row.scores for row in rows]))
            for label, rows in found.items()
        }

    def as_markdown(self) -> str:
        """Markdown: a table for each task, one over all tasks, and the notes."""
        parts = [self.tables(task) for task in self.tasks]
        if len(self.tasks) > 1:
            parts.append(self._overall_table())
        parts += ["\n".join(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n\n".join(parts) + "\n"

    def tables(self, task: Task) -> str:
        """The Markdown tables of one task: scores, which learner is better, curves."""
        parts = [self.table(task), self._pairs_table(task), self._curves_table(task)]
        return "\n\n".join(part for part in parts if part)

    def _pairs_table(self, task: Task) -> str:
        """How probably each learner's run is above a run of each lower one; empty for one row."""
        rows = self.of(task)[::-1]
        if len(rows) < 2:
            return ""
        lower = rows[1:]
        lines = [
            "Probability that a run of the row scores higher than a run of the column [95 % "
            "interval]; above 0.5 it is told apart:",
            "",
            f"| | {' | '.join(f'`{row.label}`' for row in lower)} |",
            f"|---|{'---|' * len(lower)}",
        ]
        for place, row in enumerate(rows[:-1]):
            cells = [
                _probability(improvement([row.scores], [other.scores])) if at >= place else ""
                for at, other in enumerate(lower)
            ]
            lines.append(f"| `{row.label}` | {' | '.join(cells)} |")
        return "\n".join(lines)

    def _curves_table(self, task: Task) -> str:
        """The scores over the episodes; empty without a curve."""
        rows = [row for row in self.of(task) if row.curve]
        if not rows:
            return ""
        episodes = sorted({at for row in rows for at, _ in row.curve})
        lines = [
            "Score after so many episodes, IQM [95 % interval]:",
            "",
            f"| learner | {' | '.join(f'{at:,}' for at in episodes)} |",
            f"|---|{'---|' * len(episodes)}",
        ]
        for row in rows:
            known = dict(row.curve)
            cells = [_words(known[at]) if at in known else "" for at in episodes]
            lines.append(f"| `{row.label}` | {' | '.join(cells)} |")
        return "\n".join(lines)

    def table(self, task: Task) -> str:
        """The Markdown table of one task's scores."""
        yard, first = self.yardsticks[task.name], self.of(task)[0].results[0]
        middle = _costs(task)[1]
        costs = " / ".join(f"{100 * cost:g}" for cost in _costs(task))
        lines = [
            f"**{task.name}** ({task.level}): {first.images} images, dense "
            f"{100 * first.dense_top1:.2f} %; mean top-1 over {100 * task.low:g} to "
            f"{100 * task.high:g} % of the multiply-adds: random {100 * yard.random:.2f}, oracle "
            f"{100 * yard.oracle_area:.2f}",
            "",
            "| learner | seeds | mean top-1, % | MACs saved within a point, % | "
            "score, IQM [95 % interval] | "
            f"top-1 at {costs} % of the cost | as dense at {100 * middle:g} %, % | minutes |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in self.of(task):
            top1 = 100 * np.mean([result.area for result in row.results])
            saved = 100 * np.mean([result.saved() for result in row.results])
            lines.append(
                f"| `{row.label}` | {len(row.results)} | {top1:.2f} | {saved:.1f} | "
                f"{_words(row.interval)} | {_at_costs(row)} | {_agreement(row, middle)} | "
                f"{np.mean([result.seconds for result in row.results]) / 60:.1f} |"
            )
        return "\n".join(lines)

    def _overall_table(self) -> str:
        lines = [
            "**all tasks**",
            "",
            "| learner | tasks | score, IQM [95 % interval] |",
            "|---|---|---|",
        ]
        ranked = sorted(self.overall().items(), key=lambda item: (item[1][0], item[1][1].iqm))
        lines += [
            f"| `{label}` | {', '.join(tasks)} | {_words(interval)} |"
            for label, (tasks, interval) in ranked
        ]
        return "\n".join(lines)

    def marl_eval(self) -> tuple[dict[str, Any], list[str]]:
        """The scores in the layout that marl-eval's tools read, and the learners left out.

        The levels are environment (the game's id), task, algorithm, seed, then ``step_1`` with
        ``step_count`` (the budget in agent-steps) and ``absolute_metrics``, each with the score as
        ``return``. marl-eval requires the same algorithms on every task of an environment and the
        same number of seeds, here that of the task. Learners without these are left out.
        """
        complete = [
            row
            for row in self.rows
            if {result.seed for result in row.results} >= set(range(row.task.seeds))
        ]
        layout: dict[str, Any] = {}
        for task in self.tasks:
            alike = [other for other in self.tasks if other.environment == task.environment]
            played = [{row.label for row in complete if row.task is other} for other in alike]
            shared = set.intersection(*played)
            layout.setdefault(task.environment, {})[task.name] = {
                row.label.replace(",", ";"): {
                    f"seed_{result.seed}": {
                        "step_1": {"step_count": task.agent_steps, "return": [score]},
                        "absolute_metrics": {"return": [score]},
                    }
                    for result, score in zip(row.results, row.scores, strict=True)
                    if result.seed < task.seeds
                }
                for row in complete
                if row.task is task and row.label in shared
            }
        written = {label for tasks in layout.values() for task in tasks.values() for label in task}
        return layout, sorted({row.label.replace(",", ";") for row in self.rows} - written)


def make_report(results: Iterable[Result]) -> Report:
    """Score results together with the package's references for their tasks.

    Without results, the references of all tasks are scored.

    Raises:
        UserError: results of one task can't be compared, or there is no yardstick for them.
    """
    own = list(results)
    rows: list[Row] = []
    yardsticks: dict[str, Yardstick] = {}
    notes: list[str] = []
    for task in TASKS:
        mine = [result for result in own if result.task == task.name]
        shipped = references(task.name) if mine or not own else []
        if not (mine or shipped):
            continue
        _check_alike(task, mine)
        if mine and shipped and _conditions(mine[0]) != _conditions(shipped[0]):
            notes.append(
                f"{task.name}: other weights or images than the reference's, which is left out"
            )
            shipped = []
        yard = yardsticks[task.name] = make_yardstick(task, shipped or mine)
        found = sorted(_rows(task, [*shipped, *mine], yard), key=lambda row: row.interval.iqm)
        rows += found
        versions = sorted({result.version for result in mine})
        if set(versions) - {__version__}:
            made = ", ".join(versions)
            notes.append(f"{task.name}: results of tokenenv {made}; this is {__version__}")
        for dtype in sorted({_learnt_in(row) for row in found} - {"float32"}):
            labels = ", ".join(row.label for row in found if _learnt_in(row) == dtype)
            notes.append(f"{task.name}: learnt in {dtype}, measured in float32: {labels}")
    few = sorted({row.label for row in rows if len(row.results) < 2})
    if few:
        notes.append(f"no interval with fewer than 2 seeds: {', '.join(few)}")
    part = sorted({r.label for r in rows if 2 <= len(r.results) < r.task.seeds})
    if part:
        notes.append(f"not all of their task's seeds, a rough interval: {', '.join(part)}")
    return Report(tuple(rows), yardsticks, tuple(notes))


def _learnt_in(row: Row) -> str:
    return str(row.results[0].conditions["learnt_in"])


def make_yardstick(task: Task, results: Sequence[Result]) -> Yardstick:
    """The yardstick of a task, from the results of learners ``random`` and ``heuristic``.

    Raises:
        UserError: these results are missing.
    """
    random = {result.seed: result for result in results if result.learner == RANDOM}
    heuristic = next((r for r in results if r.learner == HEURISTIC and r.seed == 0), None)
    if heuristic is None or not set(range(task.seeds)) <= random.keys():
        raise UserError(
            f"scores on '{task.name}' need the learners random (seeds 0 to {task.seeds - 1}) and "
            f"heuristic: tokenenv suite run {task.name} --learner random --learner heuristic "
            "--out FOLDER, the one that is scored, or score the tasks with references alone"
        )
    plans = [*heuristic.points, *random[0].points]
    right = [unpack_hits(packed, heuristic.images) for packed in (p.right for p in plans)]
    right.append(unpack_hits(heuristic.dense, heuristic.images))
    # These plans cost the same for every image.
    cost = np.array([*(plan.macs for plan in plans), 1.0])
    oracle = oracle_front(np.stack(right, 1), cost, 1 / heuristic.classes)
    if task.front == "hull":
        oracle = hull(oracle)
    area = math.fsum(random[seed].area for seed in range(task.seeds)) / task.seeds
    return Yardstick(area, oracle, oracle.area(task.low, task.high))


def _rows(task: Task, results: Sequence[Result], yard: Yardstick) -> Iterable[Row]:
    groups: dict[tuple[bool, str], list[Result]] = {}
    for result in sorted(results, key=lambda result: result.seed):
        groups.setdefault((result.reference, result.learner), []).append(result)
    for (reference, learner), group in groups.items():
        scores = tuple(normalised(r.area, yard.random, yard.oracle_area) for r in group)
        interval = aggregate([scores])
        curve = _curve(task, group, yard, interval)
        yield Row(task, learner, tuple(group), scores, interval, reference, curve)


def _curve(
    task: Task, group: Sequence[Result], yard: Yardstick, end: Interval
) -> tuple[tuple[int, Interval], ...]:
    """Intervals of the scores at the stages that all results have; ``end`` is that of the end."""
    areas = [result.areas for result in group]
    shared = sorted(set.intersection(*(set(known) for known in areas)) - {task.budget})
    stages = [
        (at, aggregate([[normalised(a[at], yard.random, yard.oracle_area) for a in areas]]))
        for at in shared
    ]
    return (*stages, (task.budget, end)) if stages else ()


def _conditions(result: Result) -> dict[str, Any]:
    return {key: result.conditions.get(key) for key in ("task", *_SAME)}


def _check_alike(task: Task, results: Sequence[Result]) -> None:
    """Check that results of one task can be compared.

    Raises:
        UserError: they differ in settings, weights or images, the seeds of one learner differ in
            its settings, or there are two results of one learner and seed.
    """
    seen: set[tuple[str, int]] = set()
    firsts: dict[str, Result] = {}
    for result in results:
        what = f"'{result.learner}' seed {result.seed} on '{task.name}'"
        if (result.learner, result.seed) in seen:
            raise UserError(f"there are two results of {what}: remove one")
        seen.add((result.learner, result.seed))
        if result.conditions.get("task") != find_task(task.name).settings():
            raise UserError(
                f"{what} was made under other settings of the task: remove it and run it again"
            )
        own = firsts.setdefault(result.learner, result)
        for first, keys, remedy in (
            (results[0], _SAME, "compare results of the same model and images"),
            (own, _LEARNT, "remove one of them and run it again"),
        ):
            for key in keys:
                here, there = result.conditions.get(key), first.conditions.get(key)
                if here != there:
                    raise UserError(
                        f"{what} was made with {key}={here} and '{first.learner}' seed "
                        f"{first.seed} with {there}: {remedy}"
                    )


def _costs(task: Task) -> tuple[float, float, float]:
    """The fixed costs at which top-1 is shown: the ends of the range and its middle."""
    return task.low, round((task.low + task.high) / 2, 4), task.high


def _at_costs(row: Row) -> str:
    at = np.array(_costs(row.task))
    top1 = 100 * np.mean([result.front.at(at) for result in row.results], axis=0)
    return " / ".join(f"{value:.1f}" for value in top1)


def _agreement(row: Row, cost: float) -> str:
    same = np.mean([result.agreement(cost) for result in row.results])
    return "unknown" if np.isnan(same) else f"{100 * same:.1f}"


def _probability(interval: Interval) -> str:
    value, low, high = interval
    return f"{value:.2f}" if math.isnan(low) else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _words(interval: Interval) -> str:
    if math.isnan(interval.low):
        return f"{interval.iqm:.3f} [one seed]"
    return f"{interval.iqm:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
