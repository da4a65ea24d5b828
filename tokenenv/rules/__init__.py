"""What one system lets its agents see and do, and where."""

from tokenenv.rules.base import Rules
from tokenenv.rules.layer_merge import LayerMerge
from tokenenv.rules.layer_prune import LayerPrune
from tokenenv.rules.observation import Moment, Observation
from tokenenv.rules.token_prune import TokenPrune

__all__ = ["LayerMerge", "LayerPrune", "Moment", "Observation", "Rules", "TokenPrune"]
