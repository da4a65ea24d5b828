"""Comparisons of methods: sweeps, rows, Pareto front, hypervolume and tables."""

from __future__ import annotations

import csv
import html
import io
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tokenenv.errors import UserError
from tokenenv.measure.classes import ClassRow
from tokenenv.measure.evaluation import Evaluation
from tokenenv.measure.paired import Difference
from tokenenv.measure.speed import DENSE, Speed
from tokenenv.words import split_outside

if TYPE_CHECKING:
    from tokenenv.measure.seeds import SeedRow

DENSE_EXACT = "dense, exact"
"""Name of the dense model's row when it is run for its logits alone, as methods are."""

TOLERATED = 10.0
"""Top-1 below the dense model at which :func:`hypervolume` has its floor, percentage points."""


def expand(what: str) -> list[str]:
    """The single settings of a sweep: ``"tome:r=4|8"`` -> ``["tome:r=4", "tome:r=8"]``.

    A bar separates the values of a field. Several such fields give all combinations; the last
    field varies fastest.

    Raises:
        UserError: a value is missing beside a bar.
    """
    name, colon, rest = what.partition(":")
    choices = []
    for part in split_outside(rest, ","):
        key, equals, values = part.partition("=")
        several = split_outside(values, "|")
        if len(split_outside(part, "|")) > 1 and not (equals and all(several)):
            raise UserError(
                f"'{what}': '{part}' lacks a value: a sweep has the form key=1|2|3, without blanks"
            )
        choices.append([key + equals + value for value in several])
    return [name + colon + ",".join(chosen) for chosen in itertools.product(*choices)]


@dataclass(frozen=True)
class Row:
    """One method at one setting, or the dense model.

    Attributes:
        what: as the user named it.
        method: its name without the setting.
        frozen: True if the weights are the dense model's, False if they were fine-tuned.
        images: number of images evaluated.
        top1: percent.
        lost: top-1 lost against the dense model on the same images, percentage points.
        lost_low, lost_high: its 95 % interval, see
            :func:`~tokenenv.measure.paired.paired_difference`.
        agreement: share of images with the same prediction as the dense model, percent.
        gmacs: 10^9 multiply-adds per image, policy included (1 MAC = 1 FLOP).
        saved: share of the dense model's multiply-adds saved, percent.
        speeds: measured times, one entry per batch size.
        divergence: mean Kullback-Leibler divergence of its predictions from the dense ones, nats;
            None if it is not known.
    """

    what: str
    method: str
    frozen: bool
    images: int
    top1: float
    lost: float
    lost_low: float
    lost_high: float
    agreement: float
    gmacs: float
    saved: float
    speeds: tuple[Speed, ...] = field(default=())
    divergence: float | None = None

    @property
    def reference(self) -> bool:
        """Whether it is the dense model, in full or run for its logits alone."""
        return self.what in (DENSE, DENSE_EXACT)


def make_row(
    what: str, method: str, frozen: bool, result: Evaluation, speeds: Sequence[Speed] = ()
) -> Row:
    """The row of an evaluated method; arguments as the attributes of :class:`Row`."""
    report = result.report()
    lost, low, high = -result.change()
    return Row(
        what=what,
        method=method,
        frozen=frozen,
        images=len(result.labels),
        top1=100.0 * (result.reduced == result.labels).double().mean().item(),
        lost=lost,
        lost_low=low,
        lost_high=high,
        agreement=report["agreement"],
        gmacs=report["gmacs"],
        saved=result.saving,
        speeds=tuple(speeds),
        divergence=report.get("divergence"),
    )


def dense_row(result: Evaluation, speeds: Sequence[Speed] = ()) -> Row:
    """The dense model's row, from the evaluation of any method against it."""
    top1 = 100.0 * (result.dense == result.labels).double().mean().item()
    count, gmacs = len(result.labels), result.dense_macs / 1e9
    return Row(
        DENSE, DENSE, True, count, top1, 0.0, 0.0, 0.0, 100.0, gmacs, 0.0, tuple(speeds), 0.0
    )


def dense_exact_row(result: Evaluation) -> Row:
    """The dense model run for its logits alone: what every method saves without removing tokens."""
    share = result.dense_executed / result.dense_macs
    return replace(
        dense_row(result),
        what=DENSE_EXACT,
        method=DENSE_EXACT,
        gmacs=result.dense_executed / 1e9,
        saved=100.0 * (1 - share),
    )


def hypervolume(
    points: Sequence[tuple[float, float]], dense_top1: float, tolerated: float = TOLERATED
) -> float:
    """Share of the plane of MACs saved and top-1 that a method's points dominate, percent.

    The area of the union of the rectangles ``[0, s] x [f, a]`` of all points ``(s, a)``, divided
    by ``tolerated``: the hypervolume (Zitzler & Thiele 1998) of the points and of the dense model
    ``(0, dense_top1)``, with the reference point ``(0, f)``, ``f = dense_top1 - tolerated``. ``s``
    is clipped to 0 to 100.

    A method that saves ``s`` percent without losing top-1 has the value ``s``. In general the
    value is the largest saving of the method at a loss of at most ``t`` points, averaged over
    ``t`` from 0 to ``tolerated``; area above the dense model's top-1 is added. More points never
    lower it, so compare methods that were swept at the same number of settings.

    Args:
        points: percent saved, top-1 in percent.
        dense_top1: top-1 of the dense model, percent.
        tolerated: how far below the dense model's top-1 the area starts, percentage points.
    """
    area, height = 0.0, dense_top1 - tolerated
    # From the right, each point adds the area above it.
    for saved, top1 in sorted(points, reverse=True):
        if top1 > height:
            area += min(max(saved, 0.0), 100.0) * (top1 - height)
            height = top1
    return area / tolerated


def pareto_front(rows: Sequence[Row]) -> list[Row]:
    """Rows that no other row dominates in multiply-adds saved and top-1, by rising saving."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda r: (r.saved, r.top1), reverse=True):
        best = front[-1] if front else None
        equal = best is not None and (row.saved, row.top1) == (best.saved, best.top1)
        if best is None or row.top1 > best.top1 or equal:
            front.append(row)
    return front[::-1]


def best_row(rows: Sequence[Row]) -> Row | None:
    """The row with the largest saving among those that lose at most one point of top-1, or None."""
    return max((r for r in rows if r.lost <= 1.0), key=lambda r: r.saved, default=None)


def methods(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows grouped by method, by rising saving; the dense model's is left out."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if not row.reference:
            groups.setdefault(row.method, []).append(row)
    return {name: sorted(group, key=lambda r: r.saved) for name, group in groups.items()}


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison.

    Attributes:
        rows: the dense model's row first.
        model: name of the dense model.
        data: name of the images.
        timing: device, precision, threads and rounds of the timing; empty if nothing was timed.
        classes: the same images class by class.
        seeds: summaries of runs that differ in their seed alone, if they were asked for.
        published: whether multiply-adds count the last block in full, as papers do.
    """

    rows: list[Row]
    model: str
    data: str
    timing: str = ""
    classes: list[ClassRow] = field(default_factory=list)
    seeds: list[SeedRow] = field(default_factory=list)
    published: bool = False

    @property
    def counted(self) -> str:
        """How multiply-adds are counted."""
        return f"1 MAC = 1 FLOP, policy included, {last_block(self.published)}"

    @property
    def dense(self) -> Row:
        """The row of the dense model."""
        return self.rows[0]

    @property
    def batches(self) -> list[int]:
        """Batch sizes that were timed."""
        return [speed.batch for speed in self.dense.speeds]

    def covered(self) -> dict[str, float]:
        """The :func:`hypervolume` of each method, in percent, the largest first."""
        found = {
            name: hypervolume([(r.saved, r.top1) for r in group], self.dense.top1)
            for name, group in methods(self.rows).items()
        }
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON, with the units of its numbers."""
        front = [row.what for row in pareto_front(self.rows)]
        return {
            "model": self.model,
            "data": self.data,
            "timing": self.timing,
            "note": f"{self.counted}; percent, percentage points, nats",
            "rows": [asdict(row) | {"pareto": row.what in front} for row in self.rows],
            "classes": [each.to_dict() for each in self.classes],
            "seeds": [each.to_dict() for each in self.seeds],
            "hypervolume": {
                "reference": {"saved": 0.0, "top1": self.dense.top1 - TOLERATED},
                "percent": self.covered(),
            },
        }

    def records(self) -> list[dict[str, Any]]:
        """A flat dict for each row, as ``pandas.DataFrame`` takes them.

        What was timed has a column for each batch size.
        """
        front = pareto_front(self.rows)
        lines = []
        for row in self.rows:
            line = asdict(row) | {"pareto": row in front}
            for speed in line.pop("speeds"):
                line |= {f"{key}_b{speed['batch']}": speed[key] for key in _TIMED}
            lines.append(line)
        return lines

    def as_csv(self) -> str:
        """A line for each row, see :meth:`records`."""
        lines, text = self.records(), io.StringIO()
        writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        return text.getvalue()

    def _repr_html_(self) -> str:
        lines = "".join(
            f"<tr><th>{html.escape(r.what)}</th><td>{tuning(r.frozen)}</td><td>{r.top1:.2f}</td>"
            f"<td>{top1_change(r)}</td><td>{r.agreement:.1f}</td><td>{in_nats(r)}</td>"
            f"<td>{r.gmacs:.4f}</td>"
            f"<td>{r.saved:.1f}</td></tr>"
            for r in self.rows
        )
        title = f"{self.model}, {self.dense.images} images of {self.data} ({self.counted})"
        return (
            f"<table><caption>{html.escape(title)}</caption><tr><th></th><th>backbone</th>"
            "<th>top-1 %</th><th>top-1 change, pp [95 %]</th><th>same as dense %</th>"
            "<th>divergence, nats</th><th>GMACs</th>"
            f"<th>saved %</th></tr>{lines}</table>"
        )

    def as_markdown(self) -> str:
        """Three tables: accuracy and cost, hypervolume of each method, time."""
        front, groups = pareto_front(self.rows), methods(self.rows)
        parts = [
            f"# {self.model}, {self.dense.images} images of {self.data}",
            f"{self.counted}. Change: top-1 minus that of the dense "
            "model, percentage points, [95 % interval] (Newcombe's for paired proportions). "
            "Divergence: Kullback-Leibler, of the predictions from the dense model's. Front: no "
            "other row is better in MACs or top-1 and no worse in the other.",
            _table(
                "what | backbone | top-1 % | change, pp | same as dense % | divergence, nats "
                "| GMACs | saved % | front",
                [
                    f"{_code(r.what)} | {tuning(r.frozen)} | {r.top1:.2f} | {top1_change(r)} | "
                    f"{r.agreement:.1f} | {in_nats(r)} | {r.gmacs:.4f} | {r.saved:.1f} | "
                    f"{'*' if r in front else ''}"
                    for r in self.rows
                ],
            ),
            f"Hypervolume: MACs saved when 0 to {TOLERATED:g} points of top-1 may be lost, "
            f"averaged (reference point: 0 % saved, top-1 {self.dense.top1 - TOLERATED:.2f} %); "
            "points won over the dense model come on top. More rows can only cover more.",
            _table(
                "method | backbone | rows | hypervolume %",
                [
                    f"{_code(name)} | {tuning(groups[name][0].frozen)} | {len(groups[name])} | "
                    f"{covered:.2f}"
                    for name, covered in self.covered().items()
                ],
            ),
        ]
        if self.timing:
            parts += [
                f"On the clock: {self.timing}. Speed-up over the dense model in the same round, "
                "[quartiles]. Realised: its share of the speed-up of the model merely cut to "
                "these token counts; - for a model that merges by itself.",
                _table(
                    "what | batch | images/s | speed-up | peak MiB | realised %",
                    [
                        f"{_code(r.what)} | {s.batch} | {s.images_per_s:.1f} | {s.speedup:.2f} "
                        f"[{s.speedup_q25:.2f}, {s.speedup_q75:.2f}] | {s.peak_mib:.1f} | "
                        f"{'-' if s.realised_share is None else f'{100 * s.realised_share:.0f}'}"
                        for r in self.rows
                        for s in r.speeds
                    ],
                ),
            ]
        return "\n\n".join(parts) + "\n"


_TIMED = (
    "images_per_s", "speedup", "speedup_q25", "speedup_q75", "peak_mib", "slice_speedup",
    "realised_share",
)  # fmt: skip


def tuning(frozen: bool) -> str:
    """``"frozen"`` or ``"fine-tuned"``, for tables."""
    return "frozen" if frozen else "fine-tuned"


def last_block(published: bool) -> str:
    """How the last block's multiply-adds are counted, for tables."""
    return "the last block in full" if published else "of the last block what the head reads"


def in_nats(row: Row) -> str:
    """The divergence of a row, ``-`` if it is not known."""
    return "-" if row.divergence is None else f"{row.divergence:.4f}"


def top1_change(row: Row) -> str:
    """Such as ``"-0.50 [-1.20, +0.20]"``; of the dense model itself there is none."""
    if row.reference:
        return "-"
    return str(-Difference(row.lost, row.lost_low, row.lost_high))


def _code(text: str) -> str:
    escaped = text.replace("|", "\\|")
    return f"`{escaped}`"


def _table(head: str, lines: Sequence[str]) -> str:
    words = ("what", "method", "backbone", "front")
    rule = " | ".join("---" if name in words else "---:" for name in head.split(" | "))
    return "\n".join(f"| {line} |" for line in (head, rule, *lines))
