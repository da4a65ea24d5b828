"""What a comparison keeps on disk, so that the same command goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenenv._version import __version__
from tokenenv.data import ImageSource
from tokenenv.errors import UserError
from tokenenv.measure.evaluation import Evaluation
from tokenenv.measure.speed import Speed
from tokenenv.storage import read_tensors, write_json, write_tensors

_TENSORS = ("labels", "dense", "reduced", "losses", "macs", "lengths", "index")
_NUMBERS = ("dense_macs", "seconds", "dense_seconds")


def conditions(model: str, network: nn.Module, source: ImageSource) -> dict[str, Any]:
    """What all rows of a comparison have in common, in an order fit for messages."""
    names = json.dumps([source.files, source.labels.tolist()])
    return {
        "tokenenv": __version__,
        "model": model,
        "weights": fingerprint(network.state_dict()),
        "data": source.name,
        "images": len(source),
        "files": hashlib.sha256(names.encode()).hexdigest()[:16],
    }


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """A short digest of names and values."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found.update(name.encode() + values.numpy().tobytes())
    return found.hexdigest()[:16]


class State:
    """The folder ``state`` of a comparison.

    Args:
        out: the comparison's folder, new, empty, or another comparison's under the same
            ``conditions``.
        conditions: see :func:`conditions`.

    Raises:
        UserError: the folder holds something else, or a comparison under other conditions.
    """

    def __init__(self, out: Path, conditions: dict[str, Any]) -> None:
        self.folder = out / "state"
        path = self.folder / "conditions.json"
        if not path.is_file():
            if any(out.iterdir()):
                raise UserError(f"'{out}' holds other files than a comparison's: give a new --out")
            write_json(path, conditions)
        before = _read(path)
        for key, value in conditions.items():
            if before.get(key) != value:
                raise UserError(
                    f"the comparison in '{out}' has {key} '{before.get(key)}', not '{value}': "
                    "give what it was started with, or a new --out"
                )

    def load(self, key: str) -> Evaluation | None:
        """The evaluation kept under ``key``, or None.

        Raises:
            UserError: it cannot be read.
        """
        path = self._row(key)
        if not path.is_file():
            return None
        tensors, numbers = read_tensors(path)
        values: dict[str, Any] = {**tensors, **{name: numbers[name] for name in _NUMBERS}}
        return Evaluation(**values)

    def save(self, key: str, result: Evaluation) -> None:
        """Keep an evaluation."""
        tensors = {name: getattr(result, name) for name in _TENSORS}
        numbers = {name: getattr(result, name) for name in _NUMBERS}
        write_tensors(self._row(key), tensors, {"key": key, **numbers})

    def load_speeds(self, batch: int, asked: dict[str, Any]) -> list[Speed] | None:
        """The times of a batch size, where all that was ``asked`` for is the same; or None."""
        path = self._speeds(batch)
        found = _read(path) if path.is_file() else {}
        return [Speed(**row) for row in found["rows"]] if found.get("asked") == asked else None

    def save_speeds(self, batch: int, asked: dict[str, Any], rows: list[Speed]) -> None:
        """Keep the times of a batch size."""
        write_json(self._speeds(batch), {"asked": asked, "rows": [row.to_dict() for row in rows]})

    def _row(self, key: str) -> Path:
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"

    def _speeds(self, batch: int) -> Path:
        return self.folder / f"batch-{batch}.json"


class Memory:
    """In place of :class:`State` for a comparison that is written nowhere."""

    def load(self, key: str) -> None:
        """Nothing is kept."""

    def save(self, key: str, result: Evaluation) -> None:
        """Nothing is kept."""

    def load_speeds(self, batch: int, asked: dict[str, Any]) -> None:
        """Nothing is kept."""

    def save_speeds(self, batch: int, asked: dict[str, Any], rows: list[Speed]) -> None:
        """Nothing is kept."""


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        if isinstance(found, dict):
            return found
        reason = "no object"
    except (OSError, ValueError) as error:
        reason = type(error).__name__
    raise UserError(f"cannot read '{path}' ({reason}): restore it, or give a new --out")
