"""Results of learners, one per task and seed: in files, and the references in the package."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
from numpy.typing import NDArray

from tokenenv.artefact import FAULTS, Unfit, Within, check_fields, read_json, reason_of
from tokenenv.errors import UserError
from tokenenv.suite.score import Front, front
from tokenenv.suite.tasks import POINTS, find_task

REFERENCE = Path(__file__).parent / "reference"
"""Folder with a file for each task that has reference results."""

RANDOM, HEURISTIC = "random", "heuristic"
"""The learners whose points are the plans that the oracle chooses from."""


def hits(right: NDArray[np.bool_]) -> str:
    """Bits ``(n,)`` as hexadecimal digits; :func:`unpack_hits` is the inverse."""
    return np.packbits(right).tobytes().hex()


def unpack_hits(packed: str, count: int) -> NDArray[np.bool_]:
    """The ``(count,)`` bits that :func:`hits` packed."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(packed), np.uint8), count=count).astype(bool)


@dataclass(frozen=True)
class Point:
    """What a policy reached on the test images.

    Attributes:
        knob: the setting that distinguishes it from the learner's other points.
        macs: mean multiply-adds, policy included, as a share of the dense model's.
        top1: share of the images classified correctly.
        right: which images these are, see :func:`hits`; empty if the result is older than its
            keeping.
        same: share of the images classified as the dense model classifies them; None in older ones.
    """

    knob: str
    macs: float
    top1: float
    right: str = ""
    same: float | None = None


@dataclass(frozen=True)
class Stage:
    """What a learner's policies of that stage reach on the test images.

    Attributes:
        episodes: how many had been played.
        points: as in a :class:`Result`, without the single images' outcomes.
    """

    episodes: int
    points: tuple[Point, ...]


_POINT = {
    "knob": str,
    "macs": Within(0.0, 1e3),
    "top1": Within(0.0, 1.0),
    "right": str | None,
    "same": float | None,
}
_MOST = 2**32 - 1


@dataclass(frozen=True)
class Result:
    """The result of one learner on one task with one seed.

    Attributes:
        task, learner, seed: the names and the seed.
        conditions: the task's settings, package version, weights, images, and the precision of the
            model in training.
        seconds: duration of the run since it was last started or resumed.
        classes: number of outputs of the model's head.
        images: number of readable test images.
        dense: which of them the dense model classifies correctly, see :func:`hits`.
        points: one for each of its policies.
        made: versions of the libraries, number of threads, and the learner's settings; empty in
            older results.
        curve: stages of the training, in their order; empty unless they were asked for.
        reference: whether it comes with the package.
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
    made: dict[str, Any] = field(default_factory=dict)
    curve: tuple[Stage, ...] = ()
    reference: bool = field(default=False, compare=False)

    @property
    def version(self) -> str:
        """Version of the package that made the result."""
        return str(self.conditions.get("tokenenv"))

    @property
    def dense_top1(self) -> float:
        """Top-1 of the dense model, as a share of the images."""
        return float(unpack_hits(self.dense, self.images).mean())

    @property
    def front(self) -> Front:
        """The front of the points, see :mod:`tokenenv.suite.score`."""
        return self._front_of(self.points)

    def _front_of(self, points: tuple[Point, ...]) -> Front:
        cost, top1 = [p.macs for p in points], [p.top1 for p in points]
        return front(cost, top1, self.dense_top1, 1 / self.classes, find_task(self.task).front)

    @property
    def area(self) -> float:
        """The area of the front over the task's range."""
        task = find_task(self.task)
        return self.front.area(task.low, task.high)

    @property
    def areas(self) -> dict[int, float]:
        """The area of the front after how many episodes; at the end :attr:`area`."""
        task = find_task(self.task)
        found = {
            stage.episodes: self._front_of(stage.points).area(task.low, task.high)
            for stage in self.curve
        }
        return found | {task.budget: self.area}

    def saved(self, lost: float = 0.01) -> float:
        """The largest saving at a drop in top-1 of at most ``lost``, both shares.

        Half an image is allowed for rounding.
        """
        return 1 - self.front.cheapest(self.dense_top1 - lost - 0.5 / self.images)

    def agreement(self, cost: float) -> float:
        """Share of the images that get the dense model's prediction at ``cost``; NaN if unknown.

        That of the concave hull of the points, between a constant class and the dense model.
        """
        same = [p.same for p in self.points if p.same is not None]
        if len(same) < len(self.points):
            return math.nan
        found = front([p.macs for p in self.points], same, 1.0, 1 / self.classes, "hull")
        return float(found.at(np.array([cost]))[0])

    def as_json(self) -> dict[str, Any]:
        """JSON of all fields but ``reference``, and their ``sha256``."""
        described: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        del described["reference"]
        if not self.curve:
            del described["curve"]
        return described | {"sha256": _digest(described)}


def _digest(described: dict[str, Any]) -> str:
    """SHA-256 of a result's fields, whatever their order and layout in the file."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


_STAGE = {"episodes": Within(0, _MOST), "points": list}
_RESULT = {
    **get_type_hints(Result),
    "points": list,
    "curve": list,
    "seed": Within(0, _MOST),
    "seconds": Within(0.0, 1e12),
    "classes": Within(1, _MOST),
    "images": Within(1, _MOST),
}
del _RESULT["reference"]


def from_json(found: Any, where: Path) -> Result:
    """The result that :meth:`Result.as_json` described.

    Raises:
        UserError: a field is missing or invalid.
    """
    try:
        found = {"made": {}, "curve": [], **_unsealed(found)}  # once there were none
        check_fields(found, _RESULT, closed=True)
        for stage in found["curve"]:
            check_fields(stage, _STAGE, closed=True)
        curve = tuple(Stage(s["episodes"], _points(s["points"])) for s in found["curve"])
        conditions = {"learnt_in": "float32", **found["conditions"]}  # once there was no other
        read = {"points": _points(found["points"]), "curve": curve, "conditions": conditions}
        made = Result(**{**found, **read})
        _check(made)
        _ = made.areas  # all numbers are finite
        return made
    except FAULTS as error:
        if isinstance(error, UserError) and "task" in str(error):
            raise
        raise UserError(
            f"'{where}' is no result of the suite ({reason_of(error)}): restore it, or remove "
            "it and run the learner again"
        ) from None


def _points(found: list[Any]) -> tuple[Point, ...]:
    for point in found:
        check_fields({"same": None, **point}, _POINT, closed=True)
    return tuple(Point(**point) for point in found)


def _unsealed(found: Any) -> dict[str, Any]:
    """The fields of a result without their digest.

    Raises:
        Unfit: they are not those that were digested. Only tasks with step fronts may have results
            without a digest, as those of older versions.
    """
    if not isinstance(found, dict):
        raise Unfit("it is no object")
    rest = {key: value for key, value in found.items() if key != "sha256"}
    if "sha256" not in found:
        task = found.get("task")
        if not isinstance(task, str) or find_task(task).front == "steps":
            return rest
        raise Unfit("it has no sha256")
    if found["sha256"] != _digest(rest):
        raise Unfit("it was edited: its content does not have the sha256 that it names")
    return rest


def _check(made: Result) -> None:
    """Raise Unfit for values, each of its kind, that no run of the suite has together."""
    if not 1 <= len(made.points) <= POINTS:
        raise Unfit(f"{len(made.points)} points, and 1 to {POINTS} are allowed")
    at = [stage.episodes for stage in made.curve]
    if at != sorted(set(at)) or not all(stage.points for stage in made.curve):
        raise Unfit("the stages of its curve are not in their order, or one has no point")
    plan = made.learner in (RANDOM, HEURISTIC) and not made.seed
    for packed in (made.dense, *(point.right for point in made.points if point.right or plan)):
        if not re.fullmatch(f"[0-9a-f]{{{2 * math.ceil(made.images / 8)}}}", packed):
            raise Unfit(f"which images are right is not said of {made.images}")
    for point in made.points:
        if point.right:
            share = unpack_hits(point.right, made.images).mean()
            if abs(share - point.top1) > 1e-6:
                raise Unfit(f"top-1 of '{point.knob}' is not that of the images that are right")


def read_result(path: Path) -> Result:
    """A result from its file.

    Raises:
        UserError: the file can't be read, or its task is unknown or of another version.
    """
    return from_json(_read(path), path)


def references(task: str) -> list[Result]:
    """The reference results of a task; empty if the package has none."""
    path = REFERENCE / f"{task}.json"
    if not path.is_file():
        return []
    return [replace(from_json(row, path), reference=True) for row in _read(path)]


def find_results(out: Path) -> Iterator[Path]:
    """The files of all results in a folder that ``tokenenv suite run`` wrote."""
    yield from sorted((out / "results").glob("*/*.json"))


def check_conditions(result: Result, now: dict[str, Any], where: Path) -> None:
    """Check that a stored result was made under the same conditions.

    Raises:
        UserError: one differs; the message names it.
    """
    for key, value in now.items():
        if result.conditions.get(key) != value:
            raise UserError(
                f"'{where}' was made with {key}={result.conditions.get(key)} and now it is "
                f"{value}: remove it to run it again, or give another --out"
            )


def _read(path: Path) -> Any:
    return read_json(path, "restore it, or remove it and run the learner again")
