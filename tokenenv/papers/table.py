"""A paper's table with this machine's figures beside the paper's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from tokenenv.measure.evaluation import Evaluation
from tokenenv.measure.paired import Difference, paired_difference
from tokenenv.measure.speed import Speed
from tokenenv.papers.protocol import DENSE, Claim, Paper

_ROOM = 32
"""Characters of a setting in a table."""


@dataclass(frozen=True)
class Figures:
    """What was measured of one row here.

    Attributes:
        seeds: number of runs; 1 of what is not trained.
        top1: percent, mean over the seeds.
        sd: standard deviation of it over the seeds, None of a single one.
        change: top-1 minus the dense model's, points, with its 95 % interval over the images.
        gmacs: 10^9 multiply-adds per image, policy included.
        saved: share of the dense model's saved, percent.
        images_per_s: of the first seed; None: not timed.
        speedup: over the dense model in the same round, likewise.
    """

    seeds: int
    top1: float
    sd: float | None
    change: Difference
    gmacs: float
    saved: float
    images_per_s: float | None = None
    speedup: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """All attributes, as JSON."""
        return asdict(self) | {"change": self.change._asdict()}


def figures(runs: Sequence[Sequence[Evaluation]], speed: Speed | None = None) -> Figures:
    """The figures of a row.

    Args:
        runs: for each seed its evaluations, one for each view of the same images (a single one, but
            for corrupted images).
        speed: of the first seed.
    """
    views = [view for run in runs for view in run]
    hits = np.stack([(view.reduced == view.labels).double().numpy() for view in views])
    dense = np.stack([(view.dense == view.labels).double().numpy() for view in views])
    each = [
        100 * float(np.mean([(v.reduced == v.labels).double().mean().item() for v in run]))
        for run in runs
    ]
    macs = float(np.mean([view.macs.mean().item() for view in views]))
    return Figures(
        seeds=len(runs),
        top1=float(np.mean(each)),
        sd=float(np.std(each, ddof=1)) if len(each) > 1 else None,
        change=paired_difference(hits.mean(0), dense.mean(0)),
        gmacs=macs / 1e9,
        saved=100 * (1 - macs / views[0].dense_macs),
        images_per_s=None if speed is None else speed.images_per_s,
        speedup=None if speed is None else speed.speedup,
    )


def dense_figures(run: Sequence[Evaluation], speed: Speed | None = None) -> Figures:
    """Those of the dense model, from the views of any row."""
    own = [replace(view, reduced=view.dense, macs=view.macs * 0 + view.dense_macs) for view in run]
    return replace(figures([own], speed), change=Difference(0.0, 0.0, 0.0))


@dataclass(frozen=True)
class Line:
    """One row.

    Attributes:
        label: as the paper calls it.
        part: ``dense``, or a part of the protocol, or ``untrained`` for a policy's start, or
            ``absent`` for what only the paper has.
        setting: what is set here, such as the word of a matched baseline.
        here: None if nothing was measured.
        claim: the paper's numbers, None if it prints none.
        failure: why rows or seeds are missing; empty if none are.
    """

    label: str
    part: str
    setting: str = ""
    here: Figures | None = None
    claim: Claim | None = None
    failure: str = ""

    @property
    def short(self) -> str:
        """:attr:`setting` as far as a table has room for it."""
        return self.setting if len(self.setting) <= _ROOM else f"{self.setting[: _ROOM - 4]} ..."

    def to_dict(self) -> dict[str, Any]:
        """All attributes, as JSON; the paper's numbers are under ``paper``."""
        values = {k: v for k, v in vars(self).items() if k not in ("here", "claim")}
        return {
            **values,
            "here": self.here and self.here.to_dict(),
            "paper": self.claim and asdict(self.claim),
        }


@dataclass(frozen=True)
class Table:
    """The rows of one model on one set of images.

    Attributes:
        model: timm's name.
        data: what the paper calls the set.
        images: words for the images here.
        lines: the dense model first.
        timing: how was timed; empty: not at all.
    """

    model: str
    data: str
    images: str
    lines: list[Line]
    timing: str = ""

    @property
    def claimed(self) -> str:
        """The model that the paper's numbers are of; empty if there are none."""
        return next((line.claim.model for line in self.lines if line.claim), "")


def with_claims(paper: Paper, table: Table) -> Table:
    """The table with the paper's numbers beside its rows, and rows for those without one."""
    left = {claim.method: claim for claim in paper.claims_on(table.data, table.model)}
    lines = [replace(line, claim=left.pop(line.label, None)) for line in table.lines]
    lines += [Line(claim.method, "absent", claim=claim) for claim in left.values()]
    return replace(table, lines=lines)


@dataclass(frozen=True, repr=False)
class Reproduction:
    """A paper's tables, measured here.

    Attributes:
        paper: its protocol.
        tier: how much of it was run.
        tables: one for each model and set.
        device: words for the machine.
        estimate: seconds that were announced before.
        seconds: what it took, earlier calls that it went on from left out.
    """

    paper: Paper
    tier: str
    tables: list[Table]
    device: str
    estimate: float
    seconds: float

    @property
    def failures(self) -> list[str]:
        """What failed, a line each."""
        found = [
            f"{table.model}, {line.label}: {line.failure}"
            for table in self.tables
            for line in table.lines
            if line.failure
        ]
        return list(dict.fromkeys(found))

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON."""
        return {
            "paper": {
                "name": self.paper.name,
                "title": self.paper.title,
                "flops": self.paper.flops,
            },
            "tier": self.tier,
            "device": self.device,
            "estimated_seconds": self.estimate,
            "seconds": self.seconds,
            "note": f"'here' counts 1 MAC = 1 FLOP, policy included; 'paper' is what the paper "
            f"claims and was not measured here ({self.paper.flops})",
            "notes": self.all_notes(),
            "tables": [
                {**vars(table), "lines": [line.to_dict() for line in table.lines]}
                for table in self.tables
            ],
        }

    def all_notes(self) -> list[str]:
        """What a reader has to know, a sentence each."""
        matched = {
            "top1": "as accurate on held-back training images as the paper's method",
            "macs": "such that they save as much there as the paper's method",
        }[self.paper.match]
        return [
            "Here: 1 MAC = 1 FLOP, policy included. Change: top-1 minus that of the dense model on "
            "the same images, percentage points, with its 95 % interval over the images (of "
            "several seeds: of their mean); sd is over the seeds.",
            f"Paper: what the paper claims, for the model named above its columns; not measured "
            f"here. FLOPs as it counts them: {self.paper.flops}. Change, saving and speed-up are "
            "against its own dense model.",
            f"Baselines are set, by bisection of their knob, {matched}.",
            *self.paper.notes,
            *self._long_settings(),
        ]

    def _long_settings(self) -> list[str]:
        """The settings that the tables have no room for."""
        found = [
            f"{table.model}, {line.label}: {line.setting}"
            for table in self.tables
            for line in table.lines
            if line.short != line.setting
        ]
        return list(dict.fromkeys(found))

    def as_markdown(self) -> str:
        """All tables, then notes."""
        parts = [
            f"# {self.paper.title}",
            f"Tier {self.tier}, {self.device}; {tqdm.format_interval(self.seconds)} (announced: "
            f"{tqdm.format_interval(self.estimate)}).",
        ]
        for table in self.tables:
            shown = page_table(table)
            rows = [shown["heads"], ["---"] * len(shown["heads"]), *shown["rows"]]
            text = "\n".join(
                f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
                for row in rows
            )
            parts += [f"## {shown['title']}", shown["note"], text]
        parts += ["## Notes", "\n".join(f"- {note}" for note in self.all_notes())]
        if self.failures:
            parts += ["## Failed", "\n".join(f"- {each}" for each in self.failures)]
        return "\n\n".join(parts) + "\n"

    def __repr__(self) -> str:
        rows = sum(line.here is not None for table in self.tables for line in table.lines)
        return f"<Reproduction of {self.paper.name}, tier {self.tier}: {rows} rows>"


def page_table(table: Table) -> dict[str, Any]:
    """A table as a page has it: title, note, heads and rows of text."""
    paper = "paper's claim"
    heads = [
        "row", "setting", "seeds", "top-1 %", "change, pp [95 %]", "sd", "GMACs", "saved %",
        "speed-up", f"{paper}: top-1 %", "change, pp", "GFLOPs as printed", "saved %", "speed-up",
    ]  # fmt: skip
    note = f"The last five columns are the paper's claim for {table.claimed} on {table.data}; "
    note += "the others were measured here."
    if not table.claimed:
        note = f"The paper prints no numbers on {table.data}."
    return {
        "title": f"{table.model}, {table.images}",
        "note": " ".join([note, f"On the clock: {table.timing}." if table.timing else ""]).strip(),
        "heads": heads,
        "rows": [_cells(line) for line in table.lines],
    }


def _cells(line: Line) -> list[str]:
    here, claim = line.here, line.claim or Claim("", "")
    own = [""] * 7
    if here is not None:
        change = "" if line.part == DENSE else str(here.change)
        own = [
            str(here.seeds), f"{here.top1:.2f}", change, _number(here.sd), f"{here.gmacs:.4g}",
            f"{here.saved:.1f}", _number(here.speedup),
        ]  # fmt: skip
    label = {"untrained": f"{line.label}, untrained", "absent": f"{line.label} (not run)"}
    setting = "failed, see below" if line.failure else line.short
    theirs = [
        _number(claim.top1, 1 if claim.top1 and round(claim.top1, 1) == claim.top1 else 2),
        "" if claim.change is None or line.part == DENSE else f"{claim.change:+.2f}",
        "" if claim.gflops is None else f"{claim.gflops:g}",
        "" if line.part == DENSE else _number(claim.saved, 1),
        _number(claim.speedup),
    ]
    return [label.get(line.part, line.label), setting, *own, *theirs]


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"
