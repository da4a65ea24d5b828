"""Rewards: what agents get for a decision."""

from tokenenv.game.rewards.base import Outcome, Reward, Turn, divergence
from tokenenv.game.rewards.cooperative import Cooperative
from tokenenv.game.rewards.dora import Damage, Dora
from tokenenv.game.rewards.price import ClosedLoop, PenaltyLoop
from tokenenv.game.rewards.rl4evit import AlphaBeta, KeepTarget, class_term

__all__ = [
    "AlphaBeta",
    "ClosedLoop",
    "Cooperative",
    "Damage",
    "Dora",
    "KeepTarget",
    "Outcome",
    "PenaltyLoop",
    "Reward",
    "Turn",
    "class_term",
    "divergence",
]
