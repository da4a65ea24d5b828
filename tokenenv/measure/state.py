"""The files of a comparison in progress, from which the same command resumes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from tokenenv._version import __version__
from tokenenv.artefact import Unfit, Within, check_fields, read_object
from tokenenv.data import ImageSource
from tokenenv.errors import UserError
from tokenenv.measure.evaluation import Evaluation
from tokenenv.measure.speed import DENSE, Speed
from tokenenv.storage import LOCK, read_tensors, write_json, write_tensors

_WHOLE, _REAL = (
    ("labels", "dense", "reduced", "lengths", "index"),
    ("losses", "divergence", "macs", "executed"),
)
_TENSORS = (*_WHOLE, *_REAL)
_POSITIVE = Within(1e-12, 1e24)
_NUMBERS = {
    "dense_macs": _POSITIVE,
    "dense_executed": _POSITIVE,
    "seconds": _POSITIVE,
    "dense_seconds": float | None,
}
_SPEED = {
    name: Within(0.0, 1e24) if kind is float else kind
    for name, kind in get_type_hints(Speed).items()
}
_REMEDY = "restore it, or give a new --out"


def conditions(model: str, network: nn.Module, source: ImageSource) -> dict[str, Any]:
    """The conditions that all rows of a comparison share; the first that differs is reported."""
    names = json.dumps([source.files, source.labels.tolist()])
    return {
        "tokenenv": __version__,
        "model": model,
        "weights": fingerprint(network.state_dict()),
        "data": source.name,
        "images": len(source),
        "preprocessing": str(source.preprocessing),
        "files": hashlib.sha256(names.encode()).hexdigest()[:16],
    }


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """The first 16 hex digits of a SHA-256 over names and values of tensors."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found.update(name.encode() + values.numpy().tobytes())
    return found.hexdigest()[:16]


class State:
    """The folder ``state`` of a comparison.

    Args:
        out: the comparison's folder: empty, or holding a comparison under the same
            ``conditions``.
        conditions: see :func:`conditions`.

    Raises:
        UserError: the folder holds something else, or a comparison under other conditions.
    """

    def __init__(self, out: Path, conditions: dict[str, Any]) -> None:
        self.folder, self._images = out / "state", conditions["images"]
        path = self.folder / "conditions.json"
        if not path.is_file():
            own = (LOCK, self.folder.name)
            # A process that was killed may have left a folder without what it was about to write.
            written = [*out.iterdir(), *self.folder.glob("[!.]*")]
            if any(other.name not in own for other in written):
                raise UserError(f"'{out}' holds other files than a comparison's: give a new --out")
            write_json(path, conditions)
        before = read_object(path, {}, _REMEDY)
        for key, value in conditions.items():
            if before.get(key) != value:
                raise UserError(
                    f"the comparison in '{out}' has {key} '{before.get(key)}', not '{value}': "
                    "give what it was started with, or a new --out"
                )

    def load(self, key: str) -> Evaluation | None:
        """The evaluation saved under ``key``, or None.

        Raises:
            UserError: its file cannot be read.
        """
        path = self._row(key)
        if not path.is_file():
            return None
        tensors, numbers = read_tensors(path)
        try:
            check_fields(numbers, _NUMBERS)
            _check_rows(tensors, self._images)
        except Unfit as error:
            raise UserError(f"cannot read '{path}' ({error}): {_REMEDY}") from None
        values: dict[str, Any] = {**tensors, **{name: numbers.get(name) for name in _NUMBERS}}
        return Evaluation(**values)

    def save(self, key: str, result: Evaluation) -> None:
        """Save an evaluation under ``key``."""
        tensors = {name: getattr(result, name) for name in _TENSORS}
        numbers = {name: getattr(result, name) for name in _NUMBERS}
        write_tensors(self._row(key), tensors, {"key": key, **numbers})

    def load_speeds(self, batch: int, asked: dict[str, Any]) -> list[Speed] | None:
        """The times of a batch size if they were taken under the same ``asked``, or None."""
        path = self._speeds(batch)
        if not path.is_file():
            return None
        found = read_object(path, {"asked": dict, "rows": list}, _REMEDY)
        if found["asked"] != asked:
            return None
        try:
            _check_speeds(found["rows"], batch, len(asked["rows"]))
            return [Speed(**row) for row in found["rows"]]
        except (Unfit, TypeError) as error:
            raise UserError(f"cannot read '{path}' ({error}): {_REMEDY}") from None

    def save_speeds(self, batch: int, asked: dict[str, Any], rows: list[Speed]) -> None:
        """Save the times of a batch size, and what was ``asked`` for."""
        write_json(self._speeds(batch), {"asked": asked, "rows": [row.to_dict() for row in rows]})

    def _row(self, key: str) -> Path:
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"

    def _speeds(self, batch: int) -> Path:
        return self.folder / f"batch-{batch}.json"


class Memory:
    """The interface of :class:`State` for a comparison without a folder: it saves nothing."""

    def load(self, key: str) -> None:
        """None: no evaluation was saved."""

    def save(self, key: str, result: Evaluation) -> None:
        """Do nothing."""

    def load_speeds(self, batch: int, asked: dict[str, Any]) -> None:
        """None: no times were saved."""

    def save_speeds(self, batch: int, asked: dict[str, Any], rows: list[Speed]) -> None:
        """Do nothing."""


def _check_speeds(rows: list[Any], batch: int, asked: int) -> None:
    """Check that the rows are the times of the dense model and of ``asked`` others.

    Raises:
        Unfit: they are not.
    """
    for row in rows:
        check_fields(row, _SPEED, closed=True)
        if row["batch"] != batch:
            raise Unfit(f"a row is of batch {row['batch']}")
    whats = [row["what"] for row in rows]
    if DENSE not in whats or len(set(whats)) != len(whats) or len(whats) != asked + 1:
        raise Unfit(f"{len(whats)} rows, and {asked + 1} methods were timed")


def _check_rows(tensors: dict[str, Tensor], most: int) -> None:
    """Check that the tensors are an evaluation's: finite rows, one for each readable image.

    ``most``: number of images.

    Raises:
        Unfit: they are not.
    """
    if set(tensors) != set(_TENSORS):
        raise Unfit(f"tensors {', '.join(sorted(tensors)):.60}")
    images = tensors["labels"].shape[:1]
    if not 1 <= images.numel() <= most:
        raise Unfit(f"{images.numel()} rows, and there are {most} images")
    for name, tensor in tensors.items():
        fits = tensor.is_floating_point() if name in _REAL else tensor.dtype == torch.int64
        if not fits:
            raise Unfit(f"'{name}' holds {tensor.dtype}")
        if tensor.shape[:1] != images or tensor.ndim != (2 if name == "lengths" else 1):
            raise Unfit(f"'{name}' is of shape {list(tensor.shape)}")
        if not tensor.isfinite().all():
            raise Unfit(f"'{name}' is not finite")
    index = tensors["index"]
    if int(index[0]) < 0 or int(index[-1]) >= most or not bool((index.diff() > 0).all()):
        raise Unfit("'index' does not rise within the images")
    for name in ("macs", "executed"):
        macs = tensors[name]
        if not bool(((macs >= 0) & (macs <= _POSITIVE.high)).all()):
            raise Unfit(f"'{name}' is out of range")
