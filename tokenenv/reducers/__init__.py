"""Published methods in which nobody decides: rules without agents."""

from tokenenv.reducers.base import Reducer
from tokenenv.reducers.evit import EViT

__all__ = ["EViT", "Reducer"]
