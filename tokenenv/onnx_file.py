"""What our ONNX files hold beside the graph: a description, and the dense model's weights."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenenv.artefact import FAULTS, Unfit, check_fields, parse_json, reason_of
from tokenenv.errors import UserError

ONNX = ".onnx"
"""How the names of our ONNX files end."""

_KEY = "tokenenv"
_REMEDY = "give a file that 'tokenenv compress --export' wrote"


def check_packages(*names: str) -> None:
    """Raise :class:`UserError` where one of these packages is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"ONNX needs the package '{name}': pip install 'tokenenv[export]'")


def described(content: bytes, said: Mapping[str, Any], weights: Mapping[str, Tensor]) -> bytes:
    """An ONNX file with a description and the weights of the dense model.

    Most weights are among the constants of the graph already, matrices transposed; the others are
    added to them.

    Args:
        content: the file.
        said: the description, as JSON.
        weights: the dense model's ``state_dict()``.
    """
    import onnx
    from onnx import numpy_helper

    model = onnx.load_from_string(content)
    held = model.graph.initializer
    places = {_digest(numpy_helper.to_array(tensor)): tensor.name for tensor in held}
    where, turned = {}, []
    for name, value in weights.items():
        values = value.detach().cpu().contiguous().numpy()
        place = places.get(_digest(values))
        if place is None and values.ndim == 2 and (place := places.get(_digest(values.T))):
            turned.append(name)
        if place is None:
            place = places[_digest(values)] = f"dense.{name}"
            held.append(numpy_helper.from_array(values, place))
        where[name] = place
    entry = model.metadata_props.add()
    entry.key = _KEY
    entry.value = json.dumps({**said, "weights": where, "transposed": turned})
    return bytes(model.SerializeToString())


def _digest(values: NDArray[Any]) -> tuple[Any, ...]:
    return values.shape, str(values.dtype), hashlib.sha256(values.tobytes()).digest()


def description(path: Path, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`described` wrote, with its fields checked as by ``check_fields``.

    Raises:
        UserError: there is no such file, it is damaged, or it is none of ours.
    """
    return _read(path, kinds)[1]


def stored_weights(path: Path) -> dict[str, Tensor]:
    """The ``state_dict()`` of the dense model, read out of the file.

    Raises:
        UserError: as for :func:`description`.
    """
    from onnx import numpy_helper

    model, said = _read(path, {"weights": dict[str, str], "transposed": list[str]})
    tensors, turned = {each.name: each for each in model.graph.initializer}, set(said["transposed"])
    try:
        found = {
            name: torch.from_numpy(numpy_helper.to_array(tensors[place]).copy())
            for name, place in said["weights"].items()
        }
        return {name: t.T.contiguous() if name in turned else t for name, t in found.items()}
    except FAULTS as error:
        raise UserError(f"cannot read '{path}' ({reason_of(error)}): {_REMEDY}") from None


def _read(path: Path, kinds: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    if not path.exists():
        raise UserError(f"cannot read '{path}' (FileNotFoundError): {_REMEDY}")
    check_packages("onnx")
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
        constants = [each.t for node in model.graph.node for each in node.attribute]
        if any(tensor.external_data for tensor in [*model.graph.initializer, *constants]):
            raise Unfit("it refers to other files")
        held = {entry.key: entry.value for entry in model.metadata_props}
        if _KEY not in held:
            raise Unfit("it doesn't say which model it holds")
        said = parse_json(held[_KEY])
        check_fields(said, kinds)
    except OSError as error:
        raise UserError(f"cannot read '{path}' ({type(error).__name__}): {_REMEDY}") from None
    except Exception as error:  # protobuf's kinds differ between its versions
        reason = error if isinstance(error, Unfit) else type(error).__name__
        raise UserError(f"cannot read '{path}' as ONNX of tokenenv ({reason}): {_REMEDY}") from None
    return model, said
