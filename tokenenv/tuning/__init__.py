"""Search for the fastest model within an accuracy budget, on this machine's clock."""

from tokenenv._agents import require_own_agents

require_own_agents()
