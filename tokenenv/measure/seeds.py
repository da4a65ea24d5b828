"""Runs of several seeds as one row: mean, spread and interval of the mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from tokenenv.measure.comparison import Row


class Spread(NamedTuple):
    """A number of several seeds.

    Attributes:
        mean: over the seeds.
        sd: standard deviation over the seeds (n - 1).
        low, high: 95 % interval of the mean by Student's t.
    """

    mean: float
    sd: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """The spread of at least two values."""
        mean, sd, n = np.mean(values).item(), np.std(values, ddof=1).item(), len(values)
        half = stats.t.ppf(0.975, n - 1).item() * sd / math.sqrt(n)
        return Spread(mean, sd, mean - half, mean + half)


@dataclass(frozen=True)
class SeedRow:
    """Rows of a comparison that differ in nothing but the seed.

    Attributes:
        what: name of the series.
        rows: their names.
        top1: percent.
        change: top-1 minus that of the dense model, percentage points.
        saved: multiply-adds saved, percent.
        agreement: images with the same prediction as the dense model, percent.
    """

    what: str
    rows: list[str]
    top1: Spread
    change: Spread
    saved: Spread
    agreement: Spread

    def to_dict(self) -> dict[str, Any]:
        """All attributes by name, spreads as their parts by name."""
        spreads = ("top1", "change", "saved", "agreement")
        return asdict(self) | {name: getattr(self, name)._asdict() for name in spreads}


def seed_rows(rows: Sequence[Row], series: Mapping[str, str]) -> list[SeedRow]:
    """A row for each series that has several.

    Args:
        rows: of a comparison.
        series: the name of each row's series, by the row's name.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.what in series:
            groups.setdefault(series[row.what], []).append(row)
    return [
        SeedRow(
            what=name,
            rows=[row.what for row in group],
            top1=Spread.of([row.top1 for row in group]),
            change=Spread.of([-row.lost for row in group]),
            saved=Spread.of([row.saved for row in group]),
            agreement=Spread.of([row.agreement for row in group]),
        )
        for name, group in groups.items()
        if len(group) > 1
    ]


def seeds_markdown(rows: Sequence[SeedRow]) -> str:
    """The rows as a table, with a line that says what stands in it."""
    lines = [
        "Runs of several seeds: mean +- standard deviation over the seeds, [95 % interval of the "
        "mean, Student's t]. The images are the same for all.",
        "",
        "| what | seeds | top-1 % | change, pp | saved % | same as dense % |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        words = row.what.replace("|", "\\|")
        cells = [f"`{words}`", str(len(row.rows)), _cell(row.top1), _cell(row.change, "+")]
        lines.append(f"| {' | '.join([*cells, _cell(row.saved), _cell(row.agreement)])} |")
    return "\n".join(lines) + "\n"


def _cell(spread: Spread, sign: str = "") -> str:
    mean, low, high = (format(v, f"{sign}.2f") for v in (spread.mean, spread.low, spread.high))
    return f"{mean} +- {spread.sd:.2f} [{low}, {high}]"
