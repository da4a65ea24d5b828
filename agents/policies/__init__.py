"""Policies, learned or not: their registry, and loading them from files."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from agents.policies.actor import ActorPolicy
from agents.policies.beam import BeamMerge, BeamPrune
from agents.policies.dynamicvit import DynamicViTPolicy
from agents.policies.gated import GatedPolicy
from agents.policies.heuristics import (
    KeepAll,
    MergeAbove,
    MergeRandom,
    MergeStrongest,
    RandomPrune,
    TopK,
)
from tokenenv.artefact import FAULTS, Unfit, check_fields, reason_of
from tokenenv.errors import UserError
from tokenenv.game.policy import Method, Policy
from tokenenv.game.stored import find_class, remake
from tokenenv.own import check_free
from tokenenv.paths import path_text
from tokenenv.reducers import REDUCERS, Reducer
from tokenenv.storage import check_values, read_tensors

POLICY = "policy.safetensors"
"""Name of a method's file in a run folder."""

_MOST = 2**16
"""The largest whole number, except for a seed, and the longest list of a stored method."""

SHIPPED = Path(__file__).parents[1] / "shipped"
"""Folder with the policies that come with the package, one folder each."""

_ANEW = "train it anew"


class Stored(Protocol):
    """A class of policies that can be loaded from a file."""

    @classmethod
    def remade(cls, config: dict[str, Any], trust: bool = False) -> Policy:
        """A policy, without weights, from its :meth:`~tokenenv.Policy.config` minus the class.

        ``trust``: whether a user's own code that the config names may be run.
        """


POLICIES: dict[str, type[Stored]] = {
    cls.__name__: cls
    for cls in (
        ActorPolicy, BeamMerge, BeamPrune, DynamicViTPolicy, GatedPolicy, KeepAll, MergeAbove,
        MergeRandom, MergeStrongest, RandomPrune, TopK,
    )
}  # fmt: skip
"""Classes of policies by name, as files have it."""

P = TypeVar("P", bound=type[Stored])


def register_policy(cls: P) -> P:
    """Register a class of policies for loading, under the class's name; a decorator.

    Raises:
        UserError: the name is taken.
    """
    check_free("policy of class", cls.__name__, POLICIES.get(cls.__name__), cls)
    POLICIES[cls.__name__] = cls
    return cls


def load_policy(path: Path, trust: bool = False) -> Method:
    """Load the method that ``save`` wrote.

    Args:
        path: the file.
        trust: whether a user's own code that the file names may be run.

    Raises:
        UserError: the file does not exist, is not a method of this version, holds values that are
            not finite or out of range, or a method of a user's own class and ``trust`` is False.
    """
    tensors, config = read_tensors(path)
    try:
        _check_size(config, tensors, trust)
        method = _remade(copy.deepcopy(config), trust)
        if isinstance(method, nn.Module):
            check_values(tensors, method.state_dict(), "its weights", _ANEW)
            method.load_state_dict(tensors)
            method.eval()
    except UserError as error:
        raise UserError(f"'{path}' can't be loaded: {error}") from error
    except FAULTS as error:
        raise UserError(
            f"'{path}' is not a policy of this version ({reason_of(error)}): {_ANEW}"
        ) from error
    return method


def _check_size(config: dict[str, Any], tensors: dict[str, Tensor], trust: bool) -> None:
    """Check sizes that a file names against its own tensors, before memory is allocated for them.

    Raises:
        Unfit: a number or a list is larger than any method's, or a tensor is of another shape.
    """
    _check_numbers({key: value for key, value in config.items() if key != "seed"})
    if config.get("class") not in POLICIES:
        return
    # On the meta device no weights are allocated. If a class can't do that, loading checks it.
    with contextlib.suppress(NotImplementedError, RuntimeError), torch.device("meta"):
        method = _remade(copy.deepcopy(config), trust)
        made = method.state_dict() if isinstance(method, nn.Module) else {}
        for name in made.keys() & tensors.keys():
            if made[name].shape != tensors[name].shape:
                raise Unfit(
                    f"'{name}' is {list(tensors[name].shape)}, not {list(made[name].shape)}"
                )


def _check_numbers(value: Any) -> None:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    if len(inner) > _MOST or (type(value) is int and abs(value) > _MOST):
        raise Unfit(f"{value!r:.40} is larger than a method's numbers and lists, {_MOST}")
    for one in inner:
        _check_numbers(one)


def _remade(config: dict[str, Any], trust: bool) -> Method:
    check_fields(config, {"class": str})
    if config["class"] == "Nobody":  # earlier versions stored reducers so
        check_fields(config, {"rules": dict})
        config = config["rules"]
    known = [*REDUCERS.values(), *POLICIES.values()]
    cls = find_class(config, known, trust)
    if isinstance(cls, type) and issubclass(cls, Reducer):
        return remake({"class": cls.__name__, **config}, [cls])
    if isinstance(cls, type) and issubclass(cls, Method) and not hasattr(cls, "remade"):
        raise UserError(
            f"its class {cls.__name__} can't be made of a file: give it a "
            "remade(cls, config, trust=False) that returns what config() describes"
        )
    made: Method = cls.remade(config, trust)
    return made


def shipped() -> list[str]:
    """Names of the policies that come with the package."""
    return sorted(p.parent.name for p in SHIPPED.glob(f"*/{POLICY}"))


def load(what: str | Path, trust: bool = False) -> Method:
    """Load a method from a folder, such as a run folder, or a shipped one by name.

    Args:
        what: the folder, or the name.
        trust: whether a user's own code that the folder's file names may be run.

    Raises:
        UserError: it is neither of the two, or :func:`load_policy` refuses the file.
    """
    name = path_text(what, "what")
    for folder in (Path(name), SHIPPED / name):
        if (folder / POLICY).is_file():
            return load_policy(folder / POLICY, trust)
    raise UserError(
        f"'{what}' is neither a run folder with a {POLICY} nor a shipped policy "
        f"({', '.join(shipped()) or 'none'}): train one with 'tokenenv train rl4evit'"
    )
