"""The benchmark suite: fixed, versioned tasks, a score, and reference results to compare with.

The tasks are in :mod:`tokenenv.suite.tasks`, the score in :mod:`tokenenv.suite.score`. Importing
this package does not import torch.
"""

from tokenenv._agents import require_own_agents
from tokenenv.suite.tasks import TASKS, Task, find_task, register_task

__all__ = ["TASKS", "Task", "find_task", "register_task"]

require_own_agents()
