"""The command line: one module per command, with its parser and one call of a function."""

from tokenenv._agents import require_own_agents

require_own_agents()
