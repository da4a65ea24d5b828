"""The registry of systems that can be trained. Imports neither torch nor timm."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from agents.systems.settings import SystemConfig, check_config
from tokenenv.errors import UserError, did_you_mean
from tokenenv.own import check_free, is_own, load_own


@dataclasses.dataclass(frozen=True)
class System:
    """A system that can be trained.

    Attributes:
        name: the name that commands take and that run folders hold.
        home: the class of its settings, or its place as ``module:Class``.
        summary: one line for the command line's help.
        origin: where a user's own class came from, see :class:`tokenenv.own.Own`; else empty.
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
            "an agent per block: whether to prune tokens, how many, and which",
        ),
        (
            "mstm",
            "agents.finetune.config:MSTMConfig",
            "fine-tunes: two patch sizes; unimportant tokens merge into the most similar ones",
        ),
        (
            "evit",
            "agents.finetune.config:EViTConfig",
            "fine-tunes: tokens of low class attention fuse into one token",
        ),
        (
            "rl4evit-finetune",
            "agents.finetune.config:RL4EViTFineTuneConfig",
            "fine-tunes the backbone under a policy that was trained before",
        ),
        (
            "dynamicvit",
            "agents.finetune.config:DynamicViTConfig",
            "fine-tunes: predictors trained by gradient choose the tokens to prune",
        ),
        (
            "ltm",
            "agents.finetune.ltm:LTMConfig",
            "fine-tunes: learned masks merge tokens in a ViT, Swin, MobileViT or EfficientViT",
        ),
    )
}
"""All systems by name."""

SHOWN = "rl4evit"
SHOWN_ON = "scenes_vit"
"""What is trained, and on which model, if neither is named: where training shows most."""

_Class = TypeVar("_Class", bound=type[SystemConfig])


def register_system(name: str, summary: str = "") -> Callable[[_Class], _Class]:
    """Register a class of settings as a system; a decorator.

    Args:
        name: the name for :func:`agents.training.train`.
        summary: one line for the command line's help.

    Raises:
        UserError: the name is taken, or the class is no valid class of settings.
    """

    def register(cls: _Class) -> _Class:
        check_config(cls)
        known = SYSTEMS.get(name)
        check_free("system", name, known.config if known else None, cls)
        SYSTEMS[name] = System(name, cls, summary)
        return cls

    return register


def find_system(word: str) -> System:
    """A system by its name, or a user's own as ``module:Config`` or ``path/to/file.py:Config``.

    Raises:
        UserError: it is unknown, can't be imported, or is no valid class of settings.
    """
    if word in SYSTEMS:
        return SYSTEMS[word]
    if not is_own(word):
        raise UserError(
            f"unknown system '{word}': choose from {', '.join(SYSTEMS)}, or give a class of your "
            f"own as module:Config or path/to/file.py:Config{did_you_mean(word, SYSTEMS)}"
        )
    own = load_own(word)
    check_config(own.object)
    place, _, name = word.rpartition(":")
    return System(f"{Path(place).name}:{name}", own.object, origin=own.origin)


def settings_of(described: dict[str, Any]) -> SystemConfig:
    """The settings of a run of a system of this package, as its ``config.json`` describes them.

    Raises:
        UserError: it names no such system.
    """
    name = described.get("system")
    if name not in SYSTEMS:
        raise UserError(f"system {name!r:.60} is none of {', '.join(SYSTEMS)}: give a run of one")
    cls = SYSTEMS[name].config
    known = {field.name for field in dataclasses.fields(cls)}
    given = {key: value for key, value in described.items() if key in known}
    return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in given.items()})
