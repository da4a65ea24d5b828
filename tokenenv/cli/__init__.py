"""What the commands of the command line do; :mod:`tokenenv.cli.main` reads their options."""

from tokenenv._agents import require_own_agents

require_own_agents()
