"""Rules: what the agents of a game observe and do, and in which blocks. Their registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from tokenenv.game.reduction import Moment, Reduction
from tokenenv.game.rules.base import Rules
from tokenenv.game.rules.layer_merge import LayerMerge
from tokenenv.game.rules.layer_prune import LayerPrune
from tokenenv.game.rules.observation import Observation
from tokenenv.game.rules.token_prune import TokenPrune
from tokenenv.own import check_free

RULES: dict[str, type[Rules]] = {
    "token_prune": TokenPrune,
    "layer_merge": LayerMerge,
    "layer_prune": LayerPrune,
}
"""Classes of rules by the name that :func:`tokenenv.build_game` takes."""

R = TypeVar("R", bound=type[Rules])


def register_rules(name: str) -> Callable[[R], R]:
    """Register a subclass of :class:`Rules`, a frozen dataclass, under a name; a decorator.

    Raises:
        UserError: the name is taken.
    """

    def register(cls: R) -> R:
        check_free("rules", name, RULES.get(name), cls)
        RULES[name] = cls
        return cls

    return register


__all__ = [
    "RULES",
    "LayerMerge",
    "LayerPrune",
    "Moment",
    "Observation",
    "Reduction",
    "Rules",
    "TokenPrune",
    "register_rules",
]
