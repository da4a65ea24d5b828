"""Published methods that nobody has to learn, and what a user would do without any."""

from tokenenv.reducers.ats import ATS
from tokenenv.reducers.base import Reducer
from tokenenv.reducers.diffrate import DiffRate
from tokenenv.reducers.evit import EViT
from tokenenv.reducers.mstm import MSTM
from tokenenv.reducers.pitome import PiToMe
from tokenenv.reducers.resize import Resize
from tokenenv.reducers.zero_tprune import ZeroTPrune

REDUCERS: tuple[type[Reducer], ...] = (EViT, MSTM, PiToMe, ATS, ZeroTPrune, DiffRate, Resize)
"""All of them; a saved policy finds its reducer here by the name of its class."""

__all__ = [
    "ATS",
    "MSTM",
    "REDUCERS",
    "DiffRate",
    "EViT",
    "PiToMe",
    "Reducer",
    "Resize",
    "ZeroTPrune",
]
