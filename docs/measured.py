"""The tables of measured figures, made of what was stored: Markdown, and how it gets into pages.

A page holds a table between two comments, ``<!-- table NAME: COMMAND -->`` and ``<!-- end -->``;
the command, ``python docs/pictures.py ...``, draws the picture of the same figures and writes the
table. ``deit_*_speed.json`` is what ``tokenenv bench --json`` wrote; the other files in
``docs/results`` hold what ``tokenenv compare`` printed. The suite's references come with the
package.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import statistics
from functools import cache
from pathlib import Path
from typing import Any

import tokenenv
from tokenenv.measure.comparison import expand
from tokenenv.measure.speed import DENSE
from tokenenv.suite.report import Report, make_report
from tokenenv.suite.score import Interval

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs/results.md")
MARKED = re.compile(
    r"^(<!-- table (\w+): python docs/pictures\.py \w+ -->\n).*?^(<!-- end -->)$", re.M | re.S
)
REFERENCE = Path(tokenenv.__file__).parent / "suite/reference"
LEARNERS = {
    "random": ("random",),
    "untrained": ("untrained",),
    "heuristic": ("heuristic",),
    "MAPPO; DORA": ("mappo", "dora"),
    "IPPO": ("ippo",),
    "stable-baselines3 PPO": ("sb3-ppo",),
}
"""Columns of the suite's table, and the learners that stand in them."""

NEAR = 72.0
"""The saving, in percent, at which the short table of the scenes compares."""


def read(name: str) -> Any:
    """What ``docs/results/NAME.json`` holds."""
    return json.loads((ROOT / f"docs/results/{name}.json").read_text(encoding="utf-8"))


def sources(picture: str) -> list[Path]:
    """The files that hold the figures of a picture."""
    if picture == "suite":
        return sorted(REFERENCE.glob("*.json"))
    names = {"deit_tiny_speed": ("deit_tiny", "deit_tiny_speed")}.get(picture, (picture,))
    return [ROOT / f"docs/results/{name}.json" for name in names]


def digest(picture: str) -> str:
    """SHA-256 of these files, which the picture carries so that an old one is noticed."""
    parts = [path.read_text(encoding="utf-8") for path in sources(picture)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def filled(page: str) -> str:
    """The text of a page with its tables made anew."""
    return MARKED.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", page)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; a bar in a cell is escaped."""
    lines = [
        "|" + "|".join(f" {cell} ".replace("|", "\\|") if cell else " " for cell in line) + "|"
        for line in (head, *rows)
    ]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def named(row: dict[str, Any]) -> str:
    """A row's method as code, with a remark behind it."""
    note = row.get("note", "")
    gap = ", " if note and not note.startswith("from") else " "
    return f"`{row['method']}`{gap}{note}".strip()


# Scenes -------------------------------------------------------------------------------------------
def is_learned(row: dict[str, Any]) -> bool:
    """Whether a row's values are those of seeds, not of a swept setting."""
    return "seeds" in row


def scenes() -> str:
    """All methods on the test scenes."""
    rows = []
    for row in read("scenes")["rows"]:
        top1 = f"{each(row['top1'], 2)} %"
        name = f"`{row['method']}`"
        if is_learned(row):
            seeds = f"seeds {', '.join(map(str, row['seeds']))}"
            name = ", ".join([row["method"], *([row["note"]] if "note" in row else []), seeds])
            mean, spread = statistics.mean(row["top1"]), statistics.stdev(row["top1"])
            top1 += f" (mean {mean:.1f}, standard deviation {spread:.2f})"
        rows.append([name, f"{each(row['saved'], 1)} %", top1])
    return table(["", "MACs saved", "top-1"], rows)


def scenes_short() -> str:
    """What the learned policies reach, and of each method the setting nearest to their cost."""
    rows = []
    for row in read("scenes")["rows"]:
        if is_learned(row):
            name = "trained" if row["method"] == "trained" else f"the same, {row['method']}"
            rows.append([name, f"{each(row['saved'], 1)} %", f"{each(row['top1'], 2)} %"])
            continue
        found = zip(expand(row["method"]), row["saved"], row["top1"], strict=True)
        what, saved, top1 = min(found, key=lambda one: abs(one[1] - NEAR))
        if abs(saved - NEAR) < 1:
            rows.append([f"`{what}`", f"{saved:.1f} %", f"{top1:.2f} %"])
    return table([f"at about {NEAR:.0f} % fewer multiply-adds", "MACs saved", "top-1"], rows)


def each(values: list[float], digits: int) -> str:
    """Numbers with slashes between them."""
    return " / ".join(f"{value:.{digits}f}" for value in values)


# DeiT-Tiny ----------------------------------------------------------------------------------------
def lost(row: dict[str, Any]) -> str:
    """Points of top-1 lost, with the interval."""
    return f"{row['lost']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"


def deit_tiny() -> str:
    """Accuracy and cost of all methods on the 900 photographs."""
    rows = [
        [named(row), f"{row['saved']:.1f} %", lost(row), f"{row['same']:.1f} %"]
        for row in read("deit_tiny")["rows"]
    ]
    return table(
        ["policy", "MACs saved", "top-1 lost, pp [95 % interval]", "same prediction"], rows
    )


def timed() -> list[tuple[dict[str, Any], dict[str, dict[str, Any]]]]:
    """Methods whose accuracy and speed are known: the accuracy, and speeds at batch 64."""
    fast = [row for row in read("deit_tiny_speed") if row["batch"] == 64]
    found = []
    for row in read("deit_tiny")["rows"]:
        speeds = {one["dtype"]: one for one in fast if one["what"] == row["method"]}
        if speeds:
            found.append((row, speeds))
    return found


def deit_tiny_short() -> str:
    """The methods that were also timed, with their speed at batch 64."""
    rows = [
        [
            named(row), f"{row['saved']:.1f} %", lost(row),
            *(f"{speeds[dtype]['speedup']:.2f} x" for dtype in ("float32", "bfloat16")),
        ]
        for row, speeds in timed()
    ]  # fmt: skip
    head = ["policy, one seed each", "MACs saved", "top-1 lost, pp [95 % interval]"]
    return table([*head, "float32", "bfloat16"], rows)


def speed(name: str) -> str:
    """Speed-ups in both precisions, and the share of the sliced model's in parentheses."""
    found = read(name)
    kinds = list(dict.fromkeys((row["dtype"], row["batch"]) for row in found))
    rows = []
    for what in dict.fromkeys(row["what"] for row in found):
        cells = []
        for kind in kinds:
            (row,) = (
                row
                for row in found
                if row["what"] == what
                and (row["dtype"], row["batch"]) == kind
                and not row["compiled"]
            )
            share = "" if what == DENSE else f" ({row['realised_share']:.2f})"
            cells.append(f"{row['speedup']:.2f}{share}")
        largest = max((row for row in found if row["what"] == what), key=lambda row: row["batch"])
        saved = 100 * (1 - largest["gmacs"] / largest["gmacs_dense"])
        rows.append(["dense, eager" if what == DENSE else f"`{what}`", f"{saved:.0f} %", *cells])
    return table(["", "MACs saved", *(f"{dtype}, batch {batch}" for dtype, batch in kinds)], rows)


# Suite --------------------------------------------------------------------------------------------
@cache
def report() -> Report:
    """The suite's references, scored."""
    return make_report([])


def suite() -> str:
    """Scores of all references, a line for each task."""
    rows = []
    for task in report().tasks:
        scores = {row.learner: row.interval for row in report().of(task)}
        cells = [
            next((interval(scores[name]) for name in names if name in scores), "")
            for names in LEARNERS.values()
        ]
        rows.append([f"`{task.name}`", *cells])
    return table(["score, IQM [95 % interval]", *LEARNERS], rows)


def interval(found: Interval) -> str:
    """A score with its interval; a single seed has none."""
    words = f"{found.iqm:.2f}".replace("-0.00", "0.00")
    return words if math.isnan(found.low) else f"{words} [{found.low:.2f}, {found.high:.2f}]"


TABLES = {
    "scenes": scenes,
    "scenes_short": scenes_short,
    "deit_tiny": deit_tiny,
    "deit_tiny_short": deit_tiny_short,
    "deit_tiny_speed": lambda: speed("deit_tiny_speed"),
    "deit_small_speed": lambda: speed("deit_small_speed"),
    "suite": suite,
}
