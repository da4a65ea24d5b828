"""Published methods in which nobody decides: rules without agents."""

from tokenenv.reducers.base import Reducer
from tokenenv.reducers.evit import EViT
from tokenenv.reducers.mstm import MSTM

__all__ = ["MSTM", "EViT", "Reducer"]
