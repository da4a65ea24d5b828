"""The picture of a comparison: top-1 against multiply-adds and against images per second."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from textwrap import fill
from typing import Any

from tokenenv.game.figures import PALETTE, new_figure, png
from tokenenv.measure.comparison import (
    DENSE_EXACT,
    Comparison,
    Row,
    methods,
    pareto_front,
    tuning,
)
from tokenenv.words import split_outside

_LABELLED = 24
"""Largest number of rows for which the values of a sweep are written beside its points."""

_TITLE = 150
"""Characters of a line of the title, which the picture has room for."""


def picture(comparison: Comparison) -> bytes:
    """Draw a PNG with two panels; the second is empty if nothing was timed.

    Each method is a line, by rising saving; the dense model is a star. Frozen methods have filled
    marks and solid lines, fine-tuned ones open marks and dashed lines. Bars are the 95 % intervals
    of the difference to the dense model; the grey steps are the Pareto front of all rows.
    """
    dense, groups = comparison.dense, methods(comparison.rows)
    figure = new_figure(12, 5.6)
    by_cost, by_time = figure.subplots(1, 2, sharey=True)
    batch = max(comparison.batches, default=0)

    def rate(row: Row) -> float:
        return next(speed.images_per_s for speed in row.speeds if speed.batch == batch)

    panels: list[tuple[Any, Callable[[Row], float]]] = [(by_cost, lambda row: row.gmacs)]
    if batch:
        panels.append((by_time, rate))
    front = pareto_front(comparison.rows)
    by_cost.step(
        [row.gmacs for row in front], [row.top1 for row in front],
        where="pre", color="0.8", lw=5, zorder=0, label="Pareto front",
    )  # fmt: skip
    labels_of_points: list[Any] = []
    looks = zip(groups.items(), itertools.cycle(PALETTE), itertools.cycle("os^DvPXp<>h"))
    for (name, group), colour, mark in looks:
        for axis, place in panels:
            _draw_method(axis, name, group, [place(row) for row in group], colour, mark)
        if len(group) > 1 and len(comparison.rows) <= _LABELLED:
            for row, words in zip(group, swept([r.what for r in group]), strict=True):
                label = by_cost.annotate(
                    words, (row.gmacs, row.top1), _PLACES[0], textcoords="offset points",
                    fontsize=7, color=colour, path_effects=[_paper()],
                )  # fmt: skip
                labels_of_points.append(label)
    for axis, place in panels:
        axis.plot(place(dense), dense.top1, "*", color="k", ms=15, zorder=5, label="dense")
        axis.axhline(dense.top1, color="0.4", ls=":", lw=1, zorder=0)
    for row in comparison.rows:
        if row.what == DENSE_EXACT:
            by_cost.plot(row.gmacs, row.top1, "*", color="k", mfc="w", ms=11, label=row.what)
    by_cost.set_xlabel("GMACs per image, policy included (1 MAC = 1 FLOP); less is better")
    by_cost.set_ylabel("top-1, %")
    for axis in (by_cost, by_time):
        axis.grid(alpha=0.3)
    if batch:
        by_time.set_xlabel(f"images per second, batch {batch}; more is better")
    else:
        by_time.text(0.5, 0.5, "not timed yet", transform=by_time.transAxes, ha="center")
    title = f"{comparison.model}, {dense.images} images of {comparison.data}"
    lines = [title, comparison.timing] if comparison.timing else [title]
    figure.suptitle("\n".join(fill(line, _TITLE) for line in lines), fontsize=10)
    handles, labels = by_cost.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    _keep_apart(figure, labels_of_points)
    return png(figure)


_PLACES = ((5, -11), (5, 5), (-5, -11), (-5, 5))
"""Where a label may stand beside its point, in points; left of it where the first is negative."""


def _keep_apart(figure: Any, labels: Sequence[Any]) -> None:
    """Give each label the first place where it covers no other one; hide it if there is none."""
    figure.canvas.draw()  # the layout has to be known
    taken: list[Any] = []
    for label in labels:
        for place in _PLACES:
            label.set_position(place)
            label.set_horizontalalignment("left" if place[0] > 0 else "right")
            box = label.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
        else:
            label.set_visible(False)


def _paper() -> Any:
    """White around letters, so that lines behind them do not cross them out."""
    from matplotlib.patheffects import withStroke

    return withStroke(linewidth=2.5, foreground="w")


def swept(whats: Sequence[str]) -> list[str]:
    """The arguments in which the settings of a method differ: ``tome:r=4,...`` -> ``r=4``."""
    parts = [split_outside(what.partition(":")[2], ",") for what in whats]
    return [
        ", ".join(part for part in own if not all(part in other for other in parts))
        for own in parts
    ]


def _draw_method(
    axis: Any, name: str, group: Sequence[Row], places: Sequence[float], colour: str, mark: str
) -> None:
    frozen = group[0].frozen
    top1 = [row.top1 for row in group]
    # No accuracy lies below 0 or above 100 %, even where the interval of a difference ends there.
    spread = [
        [min(row.lost_high - row.lost, row.top1) for row in group],
        [min(row.lost - row.lost_low, 100 - row.top1) for row in group],
    ]
    axis.errorbar(places, top1, spread, fmt="none", ecolor=colour, elinewidth=1, alpha=0.25)
    axis.plot(
        places, top1, mark, ls="-" if frozen else "--", color=colour, ms=6, lw=1.3,
        mfc=colour if frozen else "w", label=f"{name} ({tuning(frozen)})",
    )  # fmt: skip
