"""Restoring an optimiser from a checkpoint, which may hold anything."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from tokenenv.artefact import Unfit


def restore(optimiser: torch.optim.Optimizer, saved: dict[str, Any], fixed: bool = False) -> None:
    """Load a saved state into an optimiser made with the same settings.

    Args:
        optimiser: the optimiser, before its first step.
        saved: the ``state_dict()`` of one with the same parameters.
        fixed: whether its settings are the same in the whole training. Otherwise, as with a
            schedule, and some optimisers count their steps among them, they are of the same kinds.

    Raises:
        Unfit: the state is none that this optimiser comes to.
    """
    before = optimiser.state_dict()
    after = _after_a_step(optimiser)
    for number, values in saved["state"].items():
        if number not in after["state"] or _kinds(values) != _kinds(after["state"][number]):
            raise Unfit(f"the optimiser's state of parameter {number!r:.40} is not its own")
    groups = saved["param_groups"]
    if _kinds(groups) not in [_kinds(known["param_groups"]) for known in (before, after)]:
        raise Unfit("the optimiser's settings are of another one")
    if [group["params"] for group in groups] != [one["params"] for one in before["param_groups"]]:
        raise Unfit("the optimiser's parameters are of another one")
    if fixed and _lists(groups) != _lists(before["param_groups"]):
        raise Unfit("the optimiser's settings are not the run's")
    optimiser.load_state_dict(saved)


def _after_a_step(optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of a copy of the optimiser after a step without gradients."""
    twin = copy.deepcopy(optimiser)
    for group in twin.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    twin.step()
    return twin.state_dict()


def _kinds(value: Any) -> Any:
    """What a nested value is, whatever its numbers are."""
    if isinstance(value, dict):
        return {name: _kinds(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_kinds(one) for one in value]
    return tuple(value.shape) if isinstance(value, Tensor) else type(value)


def _lists(value: Any) -> Any:
    """A nested value with lists for tuples, as it comes from a file."""
    if isinstance(value, dict):
        return {name: _lists(one) for name, one in value.items()}
    return [_lists(one) for one in value] if isinstance(value, list | tuple) else value
