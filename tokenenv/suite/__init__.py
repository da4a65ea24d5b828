"""The benchmark suite: fixed, versioned tasks, a score, and reference results to compare with.

The tasks are in :mod:`tokenenv.suite.tasks`, the score in :mod:`tokenenv.suite.score`. Importing
this package does not import torch.
"""

from typing import Any

from tokenenv._agents import require_own_agents
from tokenenv.suite.tasks import TASKS, Task, find_task, register_task

__all__ = ["TASKS", "Task", "find_task", "policy_from", "register_task"]

require_own_agents()


def __getattr__(name: str) -> Any:
    """:func:`~tokenenv.suite.called.policy_from`, which needs torch."""
    if name == "policy_from":
        from tokenenv.suite.called import policy_from

        return policy_from
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
