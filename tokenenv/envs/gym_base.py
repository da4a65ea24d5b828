"""A game as a Gymnasium environment: one image, one agent that decides about all its tokens."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import EzPickle
from numpy.typing import NDArray

from tokenenv.envs.cloning import Clonable
from tokenenv.envs.play import RENDER_MODES, check_time_limit, in_turn, one_image, open_play


class GameEnv(Clonable, gym.Env[NDArray[np.float32], Any], EzPickle):
    """A game with one image at a time. Subclasses name the rules and describe the game.

    Args:
        render_mode: ``human``, ``rgb_array``, ``ansi`` or None.
        **game: arguments of :func:`~tokenenv.game.build.build_game`.

    Raises:
        UserError: a value is unknown or contradicts another one.
    """

    metadata = {"render_modes": RENDER_MODES, "render_fps": 1}  # noqa: RUF012  (Gymnasium's form)
    rules: ClassVar[str]

    def __init__(self, *, render_mode: str | None = None, **game: Any) -> None:
        EzPickle.__init__(self, render_mode=render_mode, **game)
        self._play = open_play(self.rules, render_mode, game)
        self.game = self._play.game
        self.max_cycles = self.game.steps
        check_time_limit(_limit_of_make(), self.max_cycles)
        self.render_mode = render_mode
        self.action_space = self._play.action_space
        self.observation_space: spaces.Space[Any] = self._play.observation_space

    @in_turn
    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start with the next image, or with the one that ``options`` name.

        Args:
            seed: restarts the order of the images.
            options: ``index``, ``label`` or ``file`` of an image, see
                :func:`~tokenenv.envs.chosen.chosen_batch`.

        Raises:
            UserError: a negative seed, or options that name no image.
        """
        super().reset(seed=seed)
        if seed is not None or self._play.needs_seed:
            self._play.seed(self.np_random_seed)
        observation = self._play.reset(options)
        return observation[0].cpu().numpy(), self._info()

    @in_turn
    def step(self, action: Any) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Play one decision.

        Args:
            action: an element of :attr:`action_space`.

        Returns:
            The next observation, float32; the reward, summed over agents; whether the episode
            has ended; False, since nothing is truncated; the info dict.

        Raises:
            UserError: wrong shape or value, or no episode was started.
        """
        observation, reward, over = self._play.step(one_image(action))
        return observation[0].cpu().numpy(), float(reward.sum()), over, False, self._info()

    def action_masks(self) -> NDArray[np.bool_]:
        """Which actions are legal: ``(n,)`` bool, or ``(2 A,)``: 0 and 1 of agent 0, of 1, ..."""
        return self._play.legal[0].cpu().numpy().reshape(-1)

    def render(self) -> Any:
        """The image with its tokens after each decision, in the form of the render mode."""
        return self._play.draw()

    def _info(self) -> dict[str, Any]:
        play = self._play
        info = {
            "tokens_left": int(play.tokens_left[0]),
            "illegal_actions": int(play.illegal[0].sum()),
            "correct": bool(play.correct[0]),
            "dense_correct": bool(play.dense_correct[0]),
        }
        return info if play.by_count else {"active_mask": play.active[0].cpu().numpy()} | info


def _limit_of_make() -> int | None:
    """``max_episode_steps`` of the ``gymnasium.make`` that is making this environment, if one is.

    Gymnasium puts a ``TimeLimit`` around the environment and tells it nothing, and a wrapper of our
    own in the registry would forbid ``make_vec``. So the caller's arguments are read.
    """
    frame = sys._getframe(1)
    while frame.f_code.co_name == "__init__" and frame.f_back is not None:  # subclasses' too
        frame = frame.f_back
    if frame.f_code is not gym.make.__code__:
        return None
    limit: int | None = frame.f_locals["max_episode_steps"]
    return frame.f_locals["env_spec"].max_episode_steps if limit is None else limit
