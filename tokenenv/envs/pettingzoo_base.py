"""What the PettingZoo environments share: a seeded order of images, and copies without episodes."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.utils import EzPickle, seeding
from pettingzoo import AECEnv
from pettingzoo.utils import wrappers

from tokenenv.envs.cloning import Clonable, separate


class SeededPlay(Clonable):
    """Seeds the order of the images at ``reset``, as ``gymnasium.Env`` does.

    Attributes:
        np_random: a generator from the last seed, for wrappers; the game does not draw from it.
        np_random_seed: that seed; before the first ``reset`` both are drawn at random on reading.
    """

    _np_random: tuple[np.random.Generator, int] | None = None

    @property
    def np_random(self) -> np.random.Generator:
        """A generator from the last seed."""
        return self._random()[0]

    @property
    def np_random_seed(self) -> int:
        """The last seed."""
        return self._random()[1]

    def _random(self) -> tuple[np.random.Generator, int]:
        if self._np_random is None:
            self._np_random = seeding.np_random()
        return self._np_random

    def _seed(self, seed: int | None) -> None:
        """Restart the order of the images from ``seed``; without one, from a random one once."""
        if seed is not None:
            self._play.seed(seed)  # it refuses a negative one
            self._np_random = seeding.np_random(seed)
        elif self._play.needs_seed:
            self._play.seed(self.np_random_seed)


class OrderedEnv(wrappers.OrderEnforcingWrapper, EzPickle):
    """An AEC environment in PettingZoo's usual wrappers, of which a copy is not reset.

    A copy of an environment has no episode. PettingZoo's own wrapper copies that it was reset, and
    the copy then takes actions that nobody plays.

    Args:
        env: without wrappers.
    """

    def __init__(self, env: AECEnv[str, Any, Any]) -> None:
        EzPickle.__init__(self, env)
        super().__init__(wrappers.AssertOutOfBoundsWrapper(env))

    def clone(self) -> OrderedEnv:
        """As :meth:`tokenenv.envs.cloning.Clonable.clone`, in the same wrappers."""
        return separate(self)

    def __str__(self) -> str:
        """The environment's own name, as PettingZoo's wrappers give it."""
        return str(self.env)
