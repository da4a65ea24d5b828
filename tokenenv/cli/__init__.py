"""The command line: one module for each command, its options and a call of a function."""

from tokenenv._agents import require_own_agents

require_own_agents()
