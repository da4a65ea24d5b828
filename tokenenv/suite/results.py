"""What a learner reached on one task and seed, as it is kept and as the package brings it along."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenenv.errors import UserError
from tokenenv.suite.score import Front, front
from tokenenv.suite.tasks import POINTS, find_task

REFERENCE = Path(__file__).parent / "reference"
"""A file for each task that has reference results."""

RANDOM, HEURISTIC = "random", "heuristic"
"""The learners whose points are the oracle's plans."""


def hits(right: NDArray[np.bool_]) -> str:
    """``(n,)`` bits as hexadecimal digits; :func:`unpack_hits` undoes it."""
    return np.packbits(right).tobytes().hex()


def unpack_hits(packed: str, count: int) -> NDArray[np.bool_]:
    """``(count,)`` what was packed."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(packed), np.uint8), count=count).astype(bool)


@dataclass(frozen=True)
class Point:
    """A policy on the test images.

    Attributes:
        knob: what tells it from the learner's other points.
        macs: mean multiply-adds, its own included, as a share of the dense model's.
        top1: share of the images.
        right: which of them, see :func:`hits`; empty where nobody needs it.
    """

    knob: str
    macs: float
    top1: float
    right: str = ""


@dataclass(frozen=True)
class Result:
    """One learner, task and seed.

    Attributes:
        task, learner, seed: which.
        conditions: under which it was made: the task's settings, package version, weights, images,
            the precision in which the model was played to learn.
        seconds: that it took, since it was last taken up.
        classes: outputs of the model's head.
        images: readable test images.
        dense: which of them the dense model gets right, see :func:`hits`.
        points: of its policies.
        reference: whether it came with the package.
    """

    task: str
    learner: str
    seed: int
    conditions: dict[str, Any]
    seconds: float
    classes: int
    images: int
    dense: str
    points: tuple[Point, ...]
    reference: bool = field(default=False, compare=False)

    @property
    def version(self) -> str:
        """Of the package that made it."""
        return str(self.conditions.get("tokenenv"))

    @property
    def dense_top1(self) -> float:
        """Of the dense model, share of the images."""
        return float(unpack_hits(self.dense, self.images).mean())

    @property
    def front(self) -> Front:
        """See :mod:`tokenenv.suite.score`."""
        cost, top1 = [p.macs for p in self.points], [p.top1 for p in self.points]
        return front(cost, top1, self.dense_top1, 1 / self.classes)

    @property
    def area(self) -> float:
        """Of the front over the task's range."""
        task = find_task(self.task)
        return self.front.area(task.low, task.high)

    def saved(self, lost: float = 0.01) -> float:
        """The largest share of multiply-adds saved that loses no more than ``lost`` of the images.

        Half an image is allowed for rounding.
        """
        enough = self.front.top1 >= self.dense_top1 - lost - 0.5 / self.images
        return float(1 - self.front.cost[enough.argmax()])

    def as_json(self) -> dict[str, Any]:
        """All of it, but whether it is a reference; only the oracle's plans keep single images."""
        described = asdict(self)
        del described["reference"]
        if self.seed or self.learner not in (RANDOM, HEURISTIC):
            for point in described["points"]:
                del point["right"]
        return described


def from_json(found: Any, where: Path) -> Result:
    """Undo :meth:`Result.as_json`.

    Raises:
        UserError: something is missing.
    """
    try:
        points = tuple(Point(**point) for point in found["points"])
        conditions = {"learnt_in": "float32", **found["conditions"]}  # once there was no other
        made = Result(**{**found, "points": points, "conditions": conditions})
        _check(made)
        _ = made.area  # all numbers are finite
        return made
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError) and "task" in str(error):
            raise
        raise UserError(
            f"'{where}' is no result of the suite ({error}): restore it, or remove it and run "
            "the learner again"
        ) from None


def _check(made: Result) -> None:
    """Raise TypeError or ValueError where scoring would fail, or would score what can't be."""
    if not (made.points and isinstance(made.conditions, dict)):
        raise TypeError("no points")
    if not (isinstance(made.learner, str) and _whole(made.seed)):
        raise TypeError(f"learner {made.learner!r:.40}, seed {made.seed!r:.40}")
    if len(made.points) > POINTS:
        raise ValueError(f"{len(made.points)} points, and {POINTS} are allowed")
    if not (_whole(made.classes, 1) and _whole(made.images, 1)):
        raise ValueError(f"{made.images} images of {made.classes} classes")
    plan = made.learner in (RANDOM, HEURISTIC) and not made.seed
    for packed in (made.dense, *(point.right for point in made.points if point.right or plan)):
        if len(packed) != 2 * math.ceil(made.images / 8):
            raise ValueError(f"which images are right is not said of {made.images}")
    if max(point.top1 for point in made.points) > 1:
        raise ValueError("a top-1 above 1")


def _whole(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value < 2**32


def read_result(path: Path) -> Result:
    """A result from its file.

    Raises:
        UserError: it can't be read, or belongs to an unknown task or another version of one.
    """
    return from_json(_read(path), path)


def references(task: str) -> list[Result]:
    """The results that come with the package; none for some tasks."""
    path = REFERENCE / f"{task}.json"
    if not path.is_file():
        return []
    return [replace(from_json(row, path), reference=True) for row in _read(path)]


def find_results(out: Path) -> Iterator[Path]:
    """The files of all results in a folder of ``tokenenv suite run``."""
    yield from sorted((out / "results").glob("*/*.json"))


def check_conditions(result: Result, now: dict[str, Any], where: Path) -> None:
    """Refuse a kept result that was made under other conditions.

    Raises:
        UserError: naming the first that differs.
    """
    for key, value in now.items():
        if result.conditions.get(key) != value:
            raise UserError(
                f"'{where}' was made with {key}={result.conditions.get(key)} and now it is "
                f"{value}: remove it to run it again, or give another --out"
            )


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read '{path}' ({type(error).__name__}): restore it, or remove it and run "
            "the learner again"
        ) from None
