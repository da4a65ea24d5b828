"""Rewards: what agents get for a decision. Their registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from tokenenv.game.rewards.base import (
    Computation,
    FunctionReward,
    Outcome,
    Probe,
    Reward,
    Turn,
    as_reward,
    divergence,
)
from tokenenv.game.rewards.cooperative import Cooperative
from tokenenv.game.rewards.dora import Damage, Dora
from tokenenv.game.rewards.price import ClosedLoop, PenaltyLoop
from tokenenv.game.rewards.rl4evit import AlphaBeta, KeepTarget, class_term
from tokenenv.own import check_free

REWARDS: dict[str, type[Reward]] = {
    "alpha_beta": AlphaBeta,
    "keep_target": KeepTarget,
    "cooperative": Cooperative,
    "dora": Dora,
}
"""Classes of rewards by the name that environments take."""

R = TypeVar("R", bound=type[Reward])


def register_reward(name: str) -> Callable[[R], R]:
    """Register a subclass of :class:`Reward`, a dataclass, under a name; a decorator.

    Raises:
        UserError: the name is taken.
    """

    def register(cls: R) -> R:
        check_free("reward", name, REWARDS.get(name), cls)
        REWARDS[name] = cls
        return cls

    return register


__all__ = [
    "REWARDS",
    "AlphaBeta",
    "ClosedLoop",
    "Computation",
    "Cooperative",
    "Damage",
    "Dora",
    "FunctionReward",
    "KeepTarget",
    "Outcome",
    "PenaltyLoop",
    "Probe",
    "Reward",
    "Turn",
    "as_reward",
    "class_term",
    "divergence",
    "register_reward",
]
