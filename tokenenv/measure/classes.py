"""Top-1 of a comparison's methods, class by class."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tokenenv.measure.evaluation import Evaluation
from tokenenv.measure.speed import DENSE


@dataclass(frozen=True)
class ClassRow:
    """The images of one class.

    Attributes:
        label: index into the model's head.
        name: what the model calls the class.
        images: how many there are.
        top1: percent of them that the dense model and each method classify rightly, by name.
    """

    label: int
    name: str
    images: int
    top1: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """All attributes by name, as JSON."""
        return asdict(self)


def class_rows(found: Mapping[str, Evaluation], names: Callable[[int], str]) -> list[ClassRow]:
    """A row for each class that occurs, by its index.

    Args:
        found: evaluations on the same images by the methods' names, at least one.
        names: maps a class to its name.
    """
    first = next(iter(found.values()))
    predicted = {DENSE: first.dense, **{what: each.reduced for what, each in found.items()}}
    rows = []
    for label in first.labels.unique().tolist():
        here = first.labels == label
        top1 = {
            what: round(100.0 * (classes[here] == label).double().mean().item(), 3)
            for what, classes in predicted.items()
        }
        rows.append(ClassRow(label, names(label), int(here.sum()), top1))
    return rows


def classes_csv(rows: Sequence[ClassRow]) -> str:
    """A line for each class: its index, name and number of images, then top-1 of each method."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["label", "name", "images", *rows[0].top1])
    for row in rows:
        writer.writerow([row.label, row.name, row.images, *row.top1.values()])
    return text.getvalue()
