"""What one system lets its agents see and do, and where."""

from tokenenv.game.rules.base import Rules
from tokenenv.game.rules.layer_merge import LayerMerge
from tokenenv.game.rules.layer_prune import LayerPrune
from tokenenv.game.rules.observation import Moment, Observation
from tokenenv.game.rules.token_prune import TokenPrune

__all__ = ["LayerMerge", "LayerPrune", "Moment", "Observation", "Rules", "TokenPrune"]
