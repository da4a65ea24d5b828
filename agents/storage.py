"""Tensors and JSON in one safetensors file, written atomically. Never a pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tokenenv.errors import UserError


def write_tensors(path: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write ``tensors`` with ``config`` in the header; a reader sees the old file or the new one.

    Raises:
        UserError: the place cannot be written to.
    """
    data = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(data, temporary, {"tokenenv": json.dumps(config)})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write '{path}' ({error}): choose another --out") from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What :func:`write_tensors` wrote.

    Raises:
        UserError: unreadable, or written by something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(metadata["tokenenv"])
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise UserError(
            f"cannot read '{path}' as a file of tokenenv ({type(error).__name__}): "
            "is it complete, and written by tokenenv?"
        ) from None


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically.

    Raises:
        UserError: the place cannot be written to.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(value, indent=2) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write '{path}' ({error}): choose another place") from None


def flatten_state(prefix: str, state: Any, tensors: dict[str, Tensor]) -> Any:
    """Move the tensors of a nested state dict into ``tensors``; returns the JSON skeleton."""
    if isinstance(state, Tensor):
        tensors[prefix] = state
        return {"tensor": prefix}
    if isinstance(state, dict):
        items = [[k, flatten_state(f"{prefix}.{k}", v, tensors)] for k, v in state.items()]
        return {"dict": items}
    if isinstance(state, list | tuple):
        return {"list": [flatten_state(f"{prefix}.{i}", v, tensors) for i, v in enumerate(state)]}
    if state is None or isinstance(state, bool | int | float | str):
        return {"value": state}
    raise TypeError(f"cannot store a {type(state).__name__} at {prefix}")


def unflatten_state(skeleton: Any, tensors: dict[str, Tensor]) -> Any:
    """Undo :func:`flatten_state`; tuples come back as lists."""
    kind, value = next(iter(skeleton.items()))
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {k: unflatten_state(v, tensors) for k, v in value}
    if kind == "list":
        return [unflatten_state(v, tensors) for v in value]
    return value


