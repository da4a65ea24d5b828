"""A picture of scored results: fronts of accuracy over cost, and intervals of the scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tokenenv.game.figures import line_colour, new_figure, png
from tokenenv.suite.report import Report, Row
from tokenenv.suite.results import RANDOM
from tokenenv.suite.score import Front, Interval
from tokenenv.suite.tasks import Task

_STEPS = 400


def picture(report: Report) -> bytes:
    """PNG with a row for each task, and one for all tasks if there are several.

    Left: each learner's front, the mean over its seeds, with the range from the lowest to the
    highest shaded. Right: interquartile means of the scores with 95 % intervals; 0 is random, 1
    the oracle, and a hollow mark stands for a single seed. References are dashed or squares. If
    stages of a training were measured, a third column has the scores over the episodes.
    """
    tasks = report.tasks
    height = len(tasks) + (len(tasks) > 1)
    curves = any(row.curve for row in report.rows)
    figure = new_figure(17 if curves else 12, 4.4 * height)
    columns = (3, 2, 2.5) if curves else (3, 2)
    panels = figure.subplots(height, len(columns), squeeze=False, width_ratios=columns)
    learners = list(dict.fromkeys(row.learner for row in report.rows))
    colours = {learner: line_colour(i) for i, learner in enumerate(learners)}
    colours[RANDOM] = "0.45"
    for task, (left, right, *more) in zip(tasks, panels, strict=False):
        for axis in more:
            _draw_curves(axis, report, task, colours)
        _draw_fronts(left, report, task, colours)
        rows = report.of(task)
        _draw_intervals(
            right,
            [(row.label, row.interval, colours[row.learner], row.reference) for row in rows],
        )
        right.set_title(f"{task.name}: score", fontsize=10)
    if len(tasks) > 1:
        _draw_overall(panels[-1][:2], report, colours)
        for axis in panels[-1][2:]:
            axis.set_axis_off()
    return png(figure, dpi=110)


def _draw_fronts(axis: Any, report: Report, task: Task, colours: dict[str, str]) -> None:
    cost = np.linspace(task.low, task.high, _STEPS)
    rows = report.of(task)
    lowest = 1.0
    for row in rows:
        fronts = 100 * np.stack([result.front.at(cost) for result in row.results])
        style = "--" if row.reference else "-"
        axis.step(
            100 * cost, fronts.mean(0), style, where="post", color=colours[row.learner], lw=1.6,
            label=row.label,
        )  # fmt: skip
        if len(fronts) > 1:
            axis.fill_between(
                100 * cost, fronts.min(0), fronts.max(0), step="post", lw=0, alpha=0.15,
                color=colours[row.learner],
            )  # fmt: skip
        lowest = min(lowest, *(_cheapest(row)))
    oracle: Front = report.yardsticks[task.name].oracle
    axis.step(100 * cost, 100 * oracle.at(cost), "k-", where="post", lw=1.2, label="oracle")
    dense = 100 * rows[0].results[0].dense_top1
    axis.axhline(dense, color="0.4", ls=":", lw=1, label="dense")
    top = max(dense, 100 * float(oracle.top1[-1]))
    axis.set_ylim(100 * lowest - 0.05 * (top - 100 * lowest), top + 0.05 * (top - 100 * lowest))
    axis.set_xlim(100 * task.low, 100 * task.high)
    axis.set_title(f"{task.name}: mean over seeds, lowest to highest shaded", fontsize=10)
    axis.set_xlabel("multiply-adds, % of the dense model's, policy included")
    axis.set_ylabel("top-1 to be had, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="lower right")


def _cheapest(row: Row) -> list[float]:
    """Top-1 of each seed at the start of its front in the range; sets the axis' lower end."""
    found = []
    for result in row.results:
        start = max(result.front.cost[1], row.task.low)
        found.append(float(result.front.at(np.array([start]))[0]))
    return found


def _draw_intervals(axis: Any, rows: Sequence[tuple[str, Interval, str, bool]]) -> None:
    for place, (_, interval, colour, reference) in enumerate(rows):
        single = np.isnan(interval.low)
        if not single:
            axis.plot(
                [interval.low, interval.high], [place] * 2, color=colour, lw=8, alpha=0.35,
                solid_capstyle="butt",
            )  # fmt: skip
        axis.plot(
            interval.iqm, place, "s" if reference else "o", color=colour, ms=7,
            mfc="w" if single else colour,
        )  # fmt: skip
    axis.set_yticks(range(len(rows)), [label for label, *_ in rows], fontsize=8)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.axvline(0, color="0.6", lw=1, zorder=0)
    axis.set_xlabel("score, IQM and 95 % interval; random 0, oracle 1", fontsize=9)
    axis.grid(alpha=0.3, axis="x")


def _draw_curves(axis: Any, report: Report, task: Task, colours: dict[str, str]) -> None:
    """Scores over the episodes with their intervals shaded; nothing if no stage was measured."""
    rows = [row for row in report.of(task) if row.curve]
    if not rows:
        axis.set_axis_off()
        return
    for row in rows:
        episodes = [at for at, _ in row.curve]
        middle, low, high = np.array([interval for _, interval in row.curve]).T
        style = "s--" if row.reference else "o-"
        colour = colours[row.learner]
        axis.plot(episodes, middle, style, color=colour, ms=4, lw=1.6, label=row.label)
        axis.fill_between(episodes, low, high, color=colour, alpha=0.15, lw=0)
    axis.axhline(0, color="0.6", lw=1, zorder=0)
    axis.set_title(f"{task.name}: score in training", fontsize=10)
    axis.set_xlabel("episodes")
    axis.set_ylabel("score, IQM and 95 % interval", fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="lower right")


def _draw_overall(panels: Sequence[Any], report: Report, colours: dict[str, str]) -> None:
    """Left: learners with results on all tasks; right: the others, each over its own tasks."""
    named = {row.label: (colours[row.learner], row.reference) for row in report.rows}
    ranked = sorted(report.overall().items(), key=lambda item: item[1][1].iqm)
    every = [item for item in ranked if len(item[1][0]) == len(report.tasks)]
    some = [item for item in ranked if len(item[1][0]) < len(report.tasks)]
    titles = (f"over all {len(report.tasks)} tasks", "over some of the tasks, each over its own")
    for axis, title, group in zip(panels, titles, (every, some), strict=True):
        if not group:
            axis.set_axis_off()
            continue
        _draw_intervals(
            axis,
            [
                (f"{label} ({len(tasks)})", interval, *named[label])
                for label, (tasks, interval) in group
            ],
        )
        axis.set_title(f"score {title}", fontsize=10)
