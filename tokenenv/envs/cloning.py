"""Copies of an environment within an episode, for planners and search."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy, deepcopy
from typing import Any, TypeVar, cast

import numpy as np
from gymnasium import spaces
from pettingzoo import AECEnv

from tokenenv.envs.play import Play, in_turn
from tokenenv.game import Game

E = TypeVar("E")


class Clonable:
    """An environment with a ``_play`` that can be cloned."""

    _play: Play

    @in_turn
    def clone(self: E) -> E:
        """An environment in the same state that goes on by itself.

        From here on the same actions give the same observations, rewards and infos in both, bit for
        bit, and the same images follow. The clone shares the model, the images and all tensors;
        nothing is computed and no tensor is copied. It can be cloned again.
        """
        return separate(self)


def separate(env: E) -> E:
    """An environment with its wrappers as :meth:`Clonable.clone` gives it."""
    return cast(E, _apart(env, {}))


def _apart(value: Any, known: dict[int, Any]) -> Any:
    """A copy of what changes in place; all else is shared.

    Args:
        value: an environment, or what one holds.
        known: copies made so far by the ids of their originals, so that what several attributes
            refer to stays one object.
    """
    if id(value) not in known:
        known[id(value)] = _copied(value, lambda part: _apart(part, known))
    return known[id(value)]


def _copied(value: Any, apart: Callable[[Any], Any]) -> Any:
    if isinstance(value, Game):
        return value.clone()
    if isinstance(value, Play):
        return value.clone(apart(value.game))
    if isinstance(value, np.random.Generator):
        return deepcopy(value)
    if isinstance(value, spaces.Box | spaces.Discrete | spaces.MultiDiscrete):  # may be drawn from
        twin = copy(value)
        twin._np_random = apart(value._np_random)
        return twin
    if type(value) is dict:
        return {key: apart(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(apart, value))
    # The selector's class has another name before pettingzoo 1.25.
    selector = type(value).__module__ == "pettingzoo.utils.agent_selector"
    if selector or isinstance(value, Clonable | AECEnv):
        made = object.__new__(type(value))  # copy() would make an environment without an episode
        vars(made).update({name: apart(part) for name, part in vars(value).items()})
        return made
    return value
