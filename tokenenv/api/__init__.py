"""The Python functions behind the commands: evaluate, bench, compare, compress, show,
explore, watch.

Each takes methods as a user names them: a word such as ``tome:r=8``, the folder of a run, of an LTM
model or of a compressed model, the name of a shipped policy, the user's own as ``module:Name`` or
``file.py:Name``, or the object itself.
"""

from tokenenv._agents import require_own_agents

require_own_agents()
