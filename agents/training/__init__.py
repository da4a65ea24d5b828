"""Training runs: how a system is trained, evaluated, checkpointed and reported on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agents.training.run import Run
    from agents.training.start import train

__all__ = ["Run", "train"]

_HOME = {"Run": "agents.training.run", "train": "agents.training.start"}


def __getattr__(name: str) -> Any:
    """Import on first use: systems import parts of this package while they are defined."""
    if name not in _HOME:
        raise AttributeError(f"module 'agents.training' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
