"""Published methods without agents, and the baseline of smaller images. Their registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from tokenenv.own import check_free
from tokenenv.reducers.atc import ATC
from tokenenv.reducers.ats import ATS
from tokenenv.reducers.base import Reducer
from tokenenv.reducers.diffrate import DiffRate
from tokenenv.reducers.evit import EViT
from tokenenv.reducers.mctf import MCTF
from tokenenv.reducers.mstm import MSTM
from tokenenv.reducers.pitome import PiToMe
from tokenenv.reducers.resize import Resize
from tokenenv.reducers.shift import RepresentationShift
from tokenenv.reducers.tofu import ToFu
from tokenenv.reducers.zero_tprune import ZeroTPrune

REDUCERS: dict[str, type[Reducer]] = {
    "evit": EViT,
    "mstm": MSTM,
    "pitome": PiToMe,
    "ats": ATS,
    "zerotprune": ZeroTPrune,
    "diffrate": DiffRate,
    "tofu": ToFu,
    "atc": ATC,
    "mctf": MCTF,
    "shift": RepresentationShift,
    "resize": Resize,
}
"""Classes of reducers by the name that commands take; files have the name of the class."""

R = TypeVar("R", bound=type[Reducer])


def register_reducer(name: str) -> Callable[[R], R]:
    """Register a :class:`Reducer` for commands and for files that hold one; a decorator.

    Raises:
        UserError: the name, or that of the class, is taken.
    """

    def register(cls: R) -> R:
        classes = {known.__name__: known for known in REDUCERS.values()}
        check_free("reducer", name, REDUCERS.get(name), cls)
        check_free("reducer of class", cls.__name__, classes.get(cls.__name__), cls)
        REDUCERS[name] = cls
        return cls

    return register


__all__ = [
    "ATC",
    "ATS",
    "MCTF",
    "MSTM",
    "REDUCERS",
    "DiffRate",
    "EViT",
    "PiToMe",
    "Reducer",
    "RepresentationShift",
    "Resize",
    "ToFu",
    "ZeroTPrune",
    "register_reducer",
]
