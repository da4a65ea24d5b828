"""What one system lets its agents see and do, and where."""

from tokenenv.rules.observation import Observation
from tokenenv.rules.token_prune import TokenPrune

__all__ = ["Observation", "TokenPrune"]
