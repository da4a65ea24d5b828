"""Pictures of measured figures, from the files that docs/measured.py names."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import measured
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tokenenv.game.figures import line_colour, new_figure, png
from tokenenv.measure.speed import DENSE
from tokenenv.suite.score import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MADE_OF = "made of"
"""Key of a PNG's text that holds the digest of its figures."""

MARKS = "os^Dv*XP"
SHOWN_FROM = 60.0
"""Top-1 in percent below which a method on the scenes is not drawn; its row is in the table."""

LEAST_SCORE = -0.6
"""Scores below are written at the edge, not drawn."""

POINTS = "top-1, points above or below the dense model"


def save(path: Path, picture: str) -> None:
    """Draw a picture of measured figures, with their digest in it."""
    content = io.BytesIO(png(PLOTS[picture](), dpi=110))
    about = PngInfo()
    about.add_text(MADE_OF, measured.digest(picture))
    with Image.open(content) as image:
        image.convert("RGB").quantize(128).save(path, optimize=True, pnginfo=about)


# Scenes -------------------------------------------------------------------------------------------
def scenes() -> Figure:
    """Top-1 against multiply-adds saved, with what chance does to so many images."""
    found = measured.read("scenes")
    figure = new_figure(9, 5)
    axis = figure.subplots()
    rows = [row for row in found["rows"] if max(row["top1"]) >= SHOWN_FROM]
    for number, (row, mark) in enumerate(zip(rows, cycle(MARKS), strict=False)):
        learned, colour = measured.is_learned(row), line_colour(number)
        name = row["method"].split(":")[0]
        reach = [by_chance(top1, found["images"]) for top1 in row["top1"]]
        axis.errorbar(
            row["saved"], row["top1"], reach, fmt=mark, ls="" if learned else "-", color=colour,
            ms=9 if learned else 6, lw=1.2, elinewidth=1, capsize=2,
            label=f"{name} policy, 3 seeds" if learned else name,
        )  # fmt: skip
    dense_line(axis, found["dense"]["top1"])
    axis.set_xlabel("multiply-adds saved, %, the policy's own included")
    axis.set_ylabel(f"top-1, %, with 95 % intervals ({found['images']:,} scenes)")
    axis.legend(fontsize=9, loc="lower left")
    return figure


def by_chance(top1: float, images: int) -> float:
    """Half of the 95 % interval of a share, in points."""
    share = top1 / 100
    return 196 * math.sqrt(share * (1 - share) / images)


def dense_line(axis: Any, height: float) -> None:
    """A dotted line at the dense model's accuracy, and a grid."""
    axis.axhline(height, color="0.35", ls=":", lw=1.5, label="dense", zorder=0)
    axis.grid(alpha=0.3)


# DeiT-Tiny ----------------------------------------------------------------------------------------
def family(row: dict[str, Any]) -> str:
    """Which rows are joined by a line: settings of one method that differ in a number alone."""
    name, _, rest = row["method"].partition(":")
    variant = [word for word in rest.split(",") if word.split("=")[0] in ("shuffle", "fuse")]
    variant += [word for word in rest.split(",") if word.startswith("schedule")]
    variant += ["searched rates"] if row.get("note", "").startswith("searched") else []
    return ", ".join([name, *variant])


def deit_tiny() -> Figure:
    """Difference in top-1 to the dense model against multiply-adds saved."""
    groups: dict[str, list[dict[str, Any]]] = {}
    found = measured.read("deit_tiny")
    for row in found["rows"]:
        groups.setdefault(family(row), []).append(row)
    figure = new_figure(11, 6)
    axis = figure.subplots()
    for number, (name, rows) in enumerate(groups.items()):
        policy = "deit_tiny" in name
        draw_lost(
            axis, rows, [row["saved"] for row in rows], label=name, color=line_colour(number),
            fmt=f"{MARKS[(number + number // 8) % 8]}{'' if policy else '-'}",
            ms=11 if policy else 6, alpha=0.9,
        )  # fmt: skip
    dense_line(axis, 0)
    axis.set_xlabel("multiply-adds saved, %, the policy's own included")
    axis.set_ylabel(f"{POINTS}\n95 % intervals ({found['images']} photographs)")
    figure.legend(loc="outside right upper", fontsize=9)
    return figure


def draw_lost(axis: Any, rows: list[dict[str, Any]], places: list[float], **look: Any) -> None:
    """Marks at minus what is lost, with intervals."""
    reach = [
        [row["high"] - row["lost"] for row in rows],
        [row["lost"] - row["low"] for row in rows],
    ]
    lines = axis.errorbar(
        places, [-row["lost"] for row in rows], reach, lw=1.2, elinewidth=1, capsize=0, **look
    )
    for bar in lines.lines[2]:
        bar.set_alpha(0.45)


def deit_tiny_speed() -> Figure:
    """Difference in top-1 against measured speed, a panel for each precision and batch size."""
    speeds = measured.read("deit_tiny_speed")
    dtypes = list(dict.fromkeys(row["dtype"] for row in speeds))
    batches = sorted({row["batch"] for row in speeds})
    figure = new_figure(11, 6.6)
    panels = figure.subplots(len(dtypes), len(batches), sharex=True, sharey=True)
    for dtype, line in zip(dtypes, panels, strict=True):
        for batch, axis in zip(batches, line, strict=True):
            here = [row for row in speeds if (row["dtype"], row["batch"]) == (dtype, batch)]
            draw_speeds(axis, {row["what"]: row for row in here if row["what"] != DENSE})
            axis.set_title(f"{dtype}, batch {batch}", fontsize=10)
            axis.grid(alpha=0.3)
    figure.supxlabel("speed-up over the fastest dense form, with quartiles", fontsize=10)
    figure.supylabel(f"{POINTS}, 95 % intervals", fontsize=10)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=6)
    return figure


def draw_speeds(axis: Any, speeds: dict[str, dict[str, Any]]) -> None:
    """One panel."""
    axis.plot(1, 0, "*", color="0.1", ms=13, label="dense")
    axis.axvline(1, color="0.35", ls=":", lw=1.2, zorder=0)
    for number, (row, _) in enumerate(measured.timed()):
        speed = speeds[row["method"]]
        at, low, high = (speed[f"speedup{end}"] for end in ("", "_q25", "_q75"))
        draw_lost(
            axis, [row], [at], xerr=[[at - low], [high - at]], label=row["method"],
            color=line_colour(number), fmt=MARKS[number % len(MARKS)], ms=8,
        )  # fmt: skip


# Suite --------------------------------------------------------------------------------------------
def suite() -> Figure:
    """The scores of the references, a panel for each task."""
    tasks = measured.report().tasks
    figure = new_figure(11, 5.6)
    panels = figure.subplots(2, len(tasks) // 2, sharex=True).flat
    learners = [name for names in measured.LEARNERS.values() for name in names]
    for task, axis in zip(tasks, panels, strict=True):
        rows = sorted(measured.report().of(task), key=lambda row: -learners.index(row.learner))
        for place, row in enumerate(rows):
            draw_score(axis, place, row.interval, line_colour(learners.index(row.learner)))
        axis.set_yticks(range(len(rows)), [row.learner for row in rows])
        axis.set_ylim(-0.6, len(rows) - 0.4)
        axis.set_xlim(LEAST_SCORE, 1.05)
        for at, style in ((0, "-"), (1, ":")):
            axis.axvline(at, color="0.35", ls=style, lw=1, zorder=0)
        axis.grid(alpha=0.3, axis="x")
        axis.set_title(task.name, fontsize=10)
    figure.supxlabel(
        "score, interquartile mean and 95 % interval over 5 seeds (hollow: one seed); 0 is "
        "random decisions, 1 an oracle that knows the outcomes", fontsize=10,
    )  # fmt: skip
    return figure


def draw_score(axis: Any, place: int, found: Interval, colour: str) -> None:
    """A score with its interval; hollow if there is one seed, at the edge if it lies beyond."""
    if found.iqm < LEAST_SCORE:
        axis.text(LEAST_SCORE + 0.03, place, f"\N{LEFTWARDS ARROW} {found.iqm:.2f}", va="center")
        return
    single = math.isnan(found.low)
    if not single:
        axis.plot(
            [found.low, found.high], [place] * 2, color=colour, lw=7, alpha=0.4,
            solid_capstyle="butt",
        )  # fmt: skip
    axis.plot(found.iqm, place, "o", color=colour, ms=7, mfc="w" if single else colour)


PLOTS: dict[str, Callable[[], Figure]] = {
    "scenes": scenes,
    "deit_tiny": deit_tiny,
    "deit_tiny_speed": deit_tiny_speed,
    "suite": suite,
}
