"""Read a state dict out of a weights file or a training checkpoint; no code in it is executed."""

from __future__ import annotations

import argparse
import contextlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenenv.errors import UserError
from tokenenv.onnx_file import ONNX, stored_weights

_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Where checkpoints keep their weights; the first one found is taken, as timm takes it."""

_PREFIXES = ("_orig_mod.", "module.", "_orig_mod.", "model.")
"""What wrappers put before the names of weights, outermost first: torch.compile,
DistributedDataParallel and moving averages, torch.compile again, and Lightning."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from a file; code in it is not executed.

    Where a checkpoint holds several, such as raw weights and their moving average, the average is
    taken, and a line is printed that says so.

    Args:
        path: a ``.safetensors`` file, or what ``torch.save`` wrote: a state dict, or a training
            checkpoint with one under a key of timm's (``state_dict_ema``, ``model_ema``,
            ``state_dict``, ``model``), or an ONNX file of ours.

    Raises:
        UserError: the file does not exist, can't be read without running code, or holds no state
            dict.
    """
    if not path.is_file():
        raise UserError(f"weights file '{path}' does not exist: check --weights")
    if path.suffix == ONNX:
        return stored_weights(path)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, error) from None
    return _state_dict(path, _load(path))


def training_arguments(path: Path) -> dict[str, Any]:
    """What a checkpoint of timm's training script was trained with; empty of any other file.

    These are the script's options by name, such as ``model``, ``mean`` and ``crop_pct``, without
    those that were not given. No code in the file is executed.
    """
    if path.suffix in (".safetensors", ONNX) or not path.is_file():
        return {}
    try:
        held = _load(path)
    except UserError:  # told when the weights are read
        return {}
    found = held.get("args") if isinstance(held, dict) else None
    if not isinstance(found, argparse.Namespace):
        return {}
    return {name: value for name, value in vars(found).items() if value not in (None, "")}


def without_prefixes(state: dict[str, Tensor], weights: str) -> dict[str, Tensor]:
    """The same tensors under the model's own names, without the prefixes of wrappers.

    Args:
        state: the tensors.
        weights: the name of their file.

    Raises:
        UserError: two tensors get the same name.
    """
    bare: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = key
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
        if name in bare:
            raise UserError(
                f"weights '{weights}' hold '{name}' twice, once as '{key}': save the state_dict() "
                "of the model alone"
            )
        bare[name] = tensor
    return bare


def _load(path: Path) -> Any:
    try:
        # As in timm, whose checkpoints hold the training's arguments. A Namespace runs no code.
        safe = torch.serialization.safe_globals([argparse.Namespace])
        with safe, warnings.catch_warnings():  # the error below replaces them
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch raises depends on where the file is damaged
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    named: list[str] = []
    with contextlib.suppress(Exception):  # a damaged file
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    others = {name for name in named if name != "argparse.Namespace"}
    if others:
        # Of all kinds, the one that tells the user what the file holds.
        first = min(others, key=lambda name: (name.startswith(("builtins.", "torch.")), name))
        more = f" and {len(others) - 1} more kinds" if len(others) > 1 else ""
        return UserError(
            f"weights file '{path}' cannot be read without running code: it holds objects of "
            f"{first}{more}, as a whole pickled model does: save its state_dict() instead"
        )
    return UserError(
        f"weights file '{path}' cannot be read ({type(error).__name__}): "
        "give a .safetensors or a .pth state dict"
    )


def _state_dict(path: Path, held: Any) -> dict[str, Tensor]:
    """The state dict in what a file holds; one printed line if there was a choice."""
    keys = [k for k in _KEYS if held.get(k) is not None] if isinstance(held, dict) else []
    state = held[keys[0]] if keys else held
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    ):
        where = f" under '{keys[0]}'" if keys else ""
        raise UserError(
            f"weights file '{path}' holds no state dict of tensors{where}: "
            "save the model's state_dict()"
        )
    if len(keys) > 1:
        others = ", ".join(f"'{key}'" for key in keys[1:])
        print(f"weights '{path}': '{keys[0]}' is taken; the file holds {others} too")
    return state
