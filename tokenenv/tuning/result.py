"""The result of a search: a recommendation, tables, JSON."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenenv.measure.speed import Speed
from tokenenv.tuning.trials import Trial
from tokenenv.tuning.verdict import Row, lost_words, recommend, sureness


@dataclass(frozen=True, repr=False)
class Tuned:
    """The fastest model found within a budget, beside what else was tried.

    Attributes:
        model: timm's name of the dense model.
        data: name of the images.
        budget: top-1 that may be lost, percentage points.
        batch: images per pass on the clock.
        labelled: whether top-1 counts; else the share of the predictions that stay as they were.
        dtype: precision of the candidates and of the fastest dense form.
        conditions: machine and timing, in words.
        dense: the dense model's speeds, of each precision and form that was timed.
        top1: the dense model's top-1 on the choosing images, percent.
        tried: all candidates on the choosing images.
        expected: what each candidate tried on all of them is expected to lose, percentage points.
        rows: the candidates that were verified, from the safest on.
        folder: where the files are; None if none were written.
    """

    model: str
    data: str
    budget: float
    batch: int
    labelled: bool
    dtype: str
    conditions: str
    dense: tuple[Speed, ...]
    top1: float
    tried: tuple[Trial, ...]
    expected: dict[str, float]
    rows: tuple[Row, ...]
    folder: Path | None = None

    @property
    def recommended(self) -> Row | None:
        """The row to take; None if nothing faster is within the budget."""
        return recommend(self.rows, self.budget)[0]

    @property
    def runner_up(self) -> Row | None:
        """The next one; None if there is none."""
        return recommend(self.rows, self.budget)[1]

    def summary(self) -> str:
        """The recommendation in some lines."""
        best, second = self.recommended, self.runner_up
        if best is None:
            return self._nothing()
        lines = [
            f"take {best.what} in {best.speed.dtype}{', compiled' if best.speed.compiled else ''}: "
            f"{_speed(best.speed)} over the fastest dense form at batch {self.batch}"
            f"{self._over_given(best.speed)}",
            sureness(best, self.budget, self.labelled),
        ]
        if second is not None:
            lines.append(
                f"runner-up: {second.what}, {_speed(second.speed)}, "
                f"{lost_words(second.verified.pairs.lost)} points (at most {second.bound:.2f}, "
                f"{'certified' if second.certified else 'not certified'})"
            )
        return "\n".join(lines)

    def _nothing(self) -> str:
        fastest = max(self.dense, key=lambda row: row.images_per_s)
        where = "" if fastest.runtime == "torch" else f", {fastest.runtime}"
        start = (
            f"nothing faster than the dense model ({fastest.dtype}{where}) was found here that "
            f"loses at most {self.budget:g} points"
        )
        if not self.rows:
            return start
        near = min(self.rows, key=lambda row: row.verified.pairs.lost)
        return (
            f"{start}: the nearest is {near.what}, {_speed(near.speed)}, which lost "
            f"{near.verified.pairs.lost:.2f} on {near.verified.images} images that took no part in "
            "choosing"
        )

    def _over_given(self, speed: Speed) -> str:
        """The speed-up over the model as it was given, if the fastest dense form is another."""
        given = self.dense[0]
        ratio = speed.images_per_s / given.images_per_s
        fastest = max(self.dense, key=lambda row: row.images_per_s)
        if fastest is given:
            return ""
        return f", {ratio:.2f} x over {given.name} in {given.dtype}"

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON."""
        best, second = self.recommended, self.runner_up
        return {
            "model": self.model,
            "data": self.data,
            "budget": self.budget,
            "batch": self.batch,
            "labelled": self.labelled,
            "dtype": self.dtype,
            "conditions": self.conditions,
            "recommended": None if best is None else best.what,
            "runner_up": None if second is None else second.what,
            "summary": self.summary(),
            "note": "1 MAC = 1 FLOP, policy included; losses and bounds in percentage points",
            "dense": {"top1": self.top1, "speeds": [row.to_dict() for row in self.dense]},
            "rows": [asdict(row) for row in self.rows],
            "tried": [
                trial.to_dict() | {"expected": self.expected.get(trial.what)}
                for trial in self.tried
            ],
        }

    def measured(self, row: Row) -> dict[str, Any]:
        """What the model of a row says was measured of it, as JSON; on the verifying images."""
        seen, speed = row.verified, row.speed.to_dict()
        kept = (
            "batch", "images_per_s", "speedup", "speedup_q25", "speedup_q75", "dtype", "runtime",
        )  # fmt: skip
        return {
            "data": f"{seen.images} images of {self.data}",
            "machine": self.conditions,
            "speed": [{name: speed[name] for name in kept}],
            "images": seen.images,
            "top1_change": -seen.pairs.lost,
            "top1_lost_at_most": row.bound,
            "certified": row.certified,
            "agreement": seen.agreement,
            "labelled": self.labelled,
        }

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and lines of the table of dense forms and verified candidates."""
        head = [
            "what", "precision", "images/s", "speed-up [quartiles]", "GMACs", "expected loss, pp",
            "lost, pp", "at most, pp", "same as dense %", "",
        ]  # fmt: skip
        lines = [
            [row.name, row.dtype, f"{row.images_per_s:.1f}", _speed(row), f"{row.gmacs:.4f}"]
            + ["-"] * 4 + [""]
            for row in self.dense
        ]  # fmt: skip
        best, second = self.recommended, self.runner_up
        for row in self.rows:
            mark = {id(best): "recommended", id(second): "runner-up"}.get(id(row), "")
            seen = row.verified
            lines.append([
                row.speed.name, row.speed.dtype, f"{row.speed.images_per_s:.1f}",
                _speed(row.speed), f"{row.speed.gmacs:.4f}", f"{row.expected:.2f}",
                f"{seen.pairs.lost:.2f}", f"{row.bound:.2f}{'' if row.certified else ' *'}",
                f"{seen.agreement:.1f}", mark,
            ])  # fmt: skip
        return head, lines

    def as_markdown(self) -> str:
        """The summary and the tables."""
        head, lines = self.table()
        seen = self.rows[0].verified.images if self.rows else 0
        parts = [
            f"# {self.model}: at most {self.budget:g} points, batch {self.batch}",
            self.summary().replace("\n", "\n\n"),
            f"{self.data}; the dense model has {self.top1:.2f} % "
            f"{'top-1' if self.labelled else 'agreement with itself'} on the images that choose; "
            f"{self.conditions} (1 MAC = 1 FLOP, policy included). The speed-up is "
            "over the fastest form of the dense model. The expected loss is by divergence from the "
            f"dense model on the choosing images; lost and at most are on {seen} images that took "
            "no part in choosing, the bound at 95 % confidence (* not certified).",
            _markdown(head, lines),
            "All that was tried, on the choosing images:",
            _markdown(
                ["what", "images", "speed-up", "divergence, nats", "same as dense %", "lost, pp"],
                [
                    [
                        t.what, str(t.images),
                        f"below {t.limit:.2f}" if t.speedup is None else f"{t.speedup:.2f}",
                        f"{t.divergence:.4f}", f"{t.agreement:.1f}", f"{t.pairs.lost:.2f}",
                    ]
                    for t in sorted(self.tried, key=lambda t: -t.speed) if t.images
                ],
            ),
        ]  # fmt: skip
        return "\n\n".join(parts) + "\n"

    def _repr_html_(self) -> str:
        head, lines = self.table()
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>"
            for line in lines
        )
        names = "".join(f"<th>{html.escape(name)}</th>" for name in head)
        caption = html.escape(self.summary()).replace("\n", "<br>")
        return f"<table><caption>{caption}</caption><tr>{names}</tr>{rows}</table>"

    def __repr__(self) -> str:
        return f"<Tuned {self.model}: {self.summary().splitlines()[0]}>"


def _speed(row: Speed) -> str:
    return f"{row.speedup:.2f} x [{row.speedup_q25:.2f}, {row.speedup_q75:.2f}]"


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)
