"""Restoring an optimiser from a checkpoint, which may hold anything."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from tokenenv.artefact import Unfit


def restore(optimiser: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load a saved state into an optimiser made with the same settings, which it keeps.

    Args:
        optimiser: the optimiser, before its first step.
        saved: the ``state_dict()`` of one with the same parameters.

    Raises:
        Unfit: the state of a parameter is none that a step of this optimiser makes.
    """
    own = _after_a_step(optimiser)
    for number, values in saved["state"].items():
        made = own.get(number)
        if made is None or _shapes(values) != _shapes(made):
            raise Unfit(f"the optimiser's state of parameter {number!r:.40} is not its own")
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": saved["state"], "param_groups": groups})


def _after_a_step(optimiser: torch.optim.Optimizer) -> dict[Any, Any]:
    """The state of a copy of the optimiser after a step without gradients."""
    twin = copy.deepcopy(optimiser)
    for group in twin.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    twin.step()
    found: dict[Any, Any] = twin.state_dict()["state"]
    return found


def _shapes(values: dict[str, Any]) -> dict[str, Any]:
    """What each entry is, whatever its numbers are."""
    return {
        name: value.shape if isinstance(value, Tensor) else type(value)
        for name, value in values.items()
    }
