"""The systems that can be trained, by the words a user types. Nothing heavy is imported here."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from agents.systems.settings import SystemConfig, check_config
from tokenenv.errors import UserError
from tokenenv.own import is_own, load_own


@dataclasses.dataclass(frozen=True)
class System:
    """What can be trained.

    Attributes:
        name: what a run folder calls it.
        home: the class of its settings, or where that is: ``module:Class``.
        summary: one line.
        origin: of a user's own class, where it came from, see :class:`tokenenv.own.Own`.
    """

    name: str
    home: str | type[SystemConfig]
    summary: str = ""
    origin: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> type[SystemConfig]:
        """The class of its settings."""
        if not isinstance(self.home, str):
            return self.home
        module, _, name = self.home.partition(":")
        found: type[SystemConfig] = getattr(importlib.import_module(module), name)
        return found


SYSTEMS: dict[str, System] = {
    name: System(name, home, summary)
    for name, home, summary in (
        (
            "rl4evit",
            "agents.systems.rl4evit:RL4EViTConfig",
            "an agent per token, keep or prune before some blocks",
        ),
        ("dora", "agents.systems.dora:DoraConfig", "an agent per block, merges pairs of tokens"),
        (
            "dora-prune",
            "agents.systems.dora:DoraPruneConfig",
            "an agent per block: whether tokens leave, how many, and which",
        ),
        (
            "mstm",
            "agents.finetune.config:MSTMConfig",
            "fine-tunes: two scales, and what matters little merges into what it resembles",
        ),
        (
            "evit",
            "agents.finetune.config:EViTConfig",
            "fine-tunes: what the class token overlooks fuses into one token",
        ),
        (
            "rl4evit-finetune",
            "agents.finetune.config:RL4EViTFineTuneConfig",
            "fine-tunes the backbone under a policy that was trained before",
        ),
        (
            "dynamicvit",
            "agents.finetune.config:DynamicViTConfig",
            "fine-tunes: predictors trained by gradient say which tokens leave",
        ),
        (
            "ltm",
            "agents.finetune.ltm:LTMConfig",
            "fine-tunes: learned masks merge tokens in a ViT, Swin, MobileViT or EfficientViT",
        ),
    )
}
"""By name."""

_Class = TypeVar("_Class", bound=type[SystemConfig])


def register_system(name: str, summary: str = "") -> Callable[[_Class], _Class]:
    """Make a class of settings known as a system; a decorator.

    Args:
        name: what :func:`agents.training.train` shall call it.
        summary: one line.

    Raises:
        UserError: the name is taken, or the class can't be trained.
    """

    def register(cls: _Class) -> _Class:
        check_config(cls)
        if name in SYSTEMS and _place(SYSTEMS[name].home) != _place(cls):
            raise UserError(f"system '{name}' exists already: register it under another name")
        SYSTEMS[name] = System(name, cls, summary)
        return cls

    return register


def _place(home: str | type[SystemConfig]) -> str:
    """Where a class is written: a notebook's cell that runs again defines the same one anew."""
    return home if isinstance(home, str) else f"{home.__module__}:{home.__qualname__}"


def find_system(word: str) -> System:
    """A system by its name, or a user's own as ``module:Config`` or ``path/to/file.py:Config``.

    Raises:
        UserError: there is none, or it can't be imported or trained.
    """
    if word in SYSTEMS:
        return SYSTEMS[word]
    if not is_own(word):
        near = difflib.get_close_matches(word, SYSTEMS, n=1)
        hint = f"did you mean '{near[0]}'? Choose" if near else "choose"
        raise UserError(
            f"unknown system '{word}': {hint} from {', '.join(SYSTEMS)}, or give a class of your "
            "own as module:Config or path/to/file.py:Config"
        )
    own = load_own(word)
    check_config(own.object)
    place, _, name = word.rpartition(":")
    return System(f"{Path(place).name}:{name}", own.object, origin=own.origin)
