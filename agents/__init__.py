"""Learners and policies for the token games: MAPPO, IPPO, PPO, heuristics; training runs."""

from __future__ import annotations

from typing import Any

# tokenenv looks for this line: another distribution has a package named agents too.
DISTRIBUTION = "tokenenv"

__all__ = [
    "MAPPO",
    "ActorPolicy",
    "MAPPOConfig",
    "PettingZooArena",
    "SB3Policy",
    "Widths",
    "load",
    "parse_policy",
]

_HOME = {
    "MAPPO": "agents.learners.mappo",
    "MAPPOConfig": "agents.learners.mappo",
    "ActorPolicy": "agents.policies.actor",
    "SB3Policy": "agents.policies.sb3",
    "Widths": "agents.policies.actor",
    "load": "agents.policies",
    "parse_policy": "agents.policies.words",
    "PettingZooArena": "agents.learners.arena",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the command line's --help needs no torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'agents' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
