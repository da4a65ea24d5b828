"""What the commands do, as functions: evaluate, bench, compare, compress.

Each takes methods as a user names them: a word such as ``tome:r=8``, the folder of a run, of an LTM
model or of a compressed model, the name of a shipped policy, ``module:Name`` or ``file.py:Name`` of
one's own, or the object itself.
"""

from tokenenv._agents import require_own_agents

require_own_agents()
