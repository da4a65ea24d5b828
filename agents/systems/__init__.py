"""Systems that can be trained: their settings, and the game, policy and learner built from them."""

from __future__ import annotations

from typing import Any

from agents.systems.registry import SYSTEMS, System, find_system, register_system

__all__ = ["SYSTEMS", "PolicyConfig", "System", "find_system", "register_system"]


def __getattr__(name: str) -> Any:
    """Import on first use: listing the systems needs no torch."""
    if name != "PolicyConfig":
        raise AttributeError(f"module 'agents.systems' has no attribute '{name}'")
    from agents.systems.base import PolicyConfig

    return PolicyConfig
