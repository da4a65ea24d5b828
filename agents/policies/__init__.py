"""Policies: what decides in a game, learned or not. Their registry, and where they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import nn

from agents.policies.actor import ActorPolicy
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
from tokenenv.errors import UserError
from tokenenv.game.policy import Method, Policy
from tokenenv.game.stored import find_class, remake
from tokenenv.reducers import REDUCERS, Reducer
from tokenenv.storage import read_tensors

POLICY = "policy.safetensors"
"""What a folder that keeps a method calls its file."""

SHIPPED = Path(__file__).parents[1] / "shipped"
"""Folders of the policies that come with the package."""


class Stored(Protocol):
    """A class of policies that can be read back."""

    @classmethod
    def remade(cls, config: dict[str, Any], trust: bool = False) -> Policy:
        """A policy with this :meth:`~tokenenv.Policy.config`, its class left out.

        ``trust``: whether code of somebody's own, which the config names, may be run.
        """


POLICIES: dict[str, type[Stored]] = {
    cls.__name__: cls
    for cls in (
        ActorPolicy, DynamicViTPolicy, GatedPolicy, KeepAll, MergeAbove, MergeRandom,
        MergeStrongest, RandomPrune, TopK,
    )
}  # fmt: skip
"""By the name of the class, as files have it."""

P = TypeVar("P", bound=type[Stored])


def register_policy(cls: P) -> P:
    """Let a class of policies be read back from files, under the class's name.

    Raises:
        UserError: the name is taken.
    """
    if POLICIES.get(cls.__name__, cls) is not cls:
        raise UserError(f"policy class '{cls.__name__}' exists already: give it another name")
    POLICIES[cls.__name__] = cls
    return cls


def load_policy(path: Path, trust: bool = False) -> Method:
    """Read the method that its ``save`` wrote.

    Args:
        path: the file.
        trust: whether code of somebody's own, which the file names, may be run.

    Raises:
        UserError: no such file, not a method, or one of an own class without ``trust``.
    """
    tensors, config = read_tensors(path)
    try:
        method = _remade(dict(config), trust)
        if isinstance(method, nn.Module):
            method.load_state_dict(tensors)
            method.eval()
    except UserError as error:
        raise UserError(f"'{path}' can't be loaded: {error}") from error
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        reason = str(error).splitlines()[-1].strip()  # torch puts what is wrong into the last line
        raise UserError(
            f"'{path}' is not a policy of this version ({reason}): train it anew"
        ) from None
    return method


def _remade(config: dict[str, Any], trust: bool) -> Method:
    if config["class"] == "Nobody":  # how reducers were kept once
        config = config["rules"]
    known = [*REDUCERS.values(), *POLICIES.values()]
    name, cls = config["class"], find_class(config, known, trust)
    if isinstance(cls, type) and issubclass(cls, Reducer):
        return remake({"class": name, **config}, [cls])
    made: Method = cls.remade(config, trust)
    return made


def shipped() -> list[str]:
    """Names of the policies that come with the package."""
    return sorted(p.parent.name for p in SHIPPED.glob(f"*/{POLICY}"))


def load(what: str | Path, trust: bool = False) -> Method:
    """A method: from a folder that keeps one, such as a run's, or the name of a shipped one.

    Args:
        what: the folder, or the name.
        trust: whether code of somebody's own, which the folder's file names, may be run.

    Raises:
        UserError: neither of the two, or a file that :func:`load_policy` refuses.
    """
    for folder in (Path(what), SHIPPED / str(what)):
        if (folder / POLICY).is_file():
            return load_policy(folder / POLICY, trust)
    raise UserError(
        f"'{what}' is neither a run folder with a {POLICY} nor a shipped policy "
        f"({', '.join(shipped()) or 'none'}): train one with 'tokenenv train rl4evit'"
    )
