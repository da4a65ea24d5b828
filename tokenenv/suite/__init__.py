"""The benchmark suite: fixed, versioned tasks, a score, and reference results to stand beside.

Tasks are in :mod:`tokenenv.suite.tasks`, what they measure in :mod:`tokenenv.suite.score`.
Importing this imports no torch.
"""

from tokenenv._agents import require_own_agents
from tokenenv.suite.tasks import TASKS, Task, find_task

__all__ = ["TASKS", "Task", "find_task"]

require_own_agents()
