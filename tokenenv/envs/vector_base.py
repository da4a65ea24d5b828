"""A game with a batch of images as a Gymnasium ``VectorEnv``."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import gymnasium as gym
import numpy as np
import torch
from gymnasium.utils import EzPickle
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from torch import Tensor

from tokenenv.envs.cloning import Clonable
from tokenenv.envs.play import RENDER_MODES, check_time_limit, in_turn, open_play
from tokenenv.errors import check_choice


class GameVectorEnv(Clonable, gym.vector.VectorEnv[Any, Any, Any], EzPickle):
    """One batched game of ``num_envs`` images; each image is one environment of the vector.

    Subclasses name the rules. All images end together, and the next ones start in the same step
    (``AutoresetMode.SAME_STEP``), so no step is spent on resetting.

    At the end of an episode ``infos["final_info"]`` holds the infos of the ended episodes and
    ``episode``, their return ``r`` and length ``l``. ``infos["final_obs"]`` is all zeros: episodes
    terminate and are never truncated, so there is no value to bootstrap.

    Args:
        num_envs: number of images B in one batch.
        output: ``numpy``: arrays, ``final_obs`` in Gymnasium's form, an object array of ``B``
            arrays. ``torch``: tensors on the game's device, ``final_obs`` as one tensor, without
            synchronising with an accelerator before the end of an episode. Actions may be
            either.
        render_mode: ``human``, ``rgb_array``, ``ansi`` or None, for each image.
        max_episode_steps: Gymnasium passes it; one below the number of decisions is refused.
        **game: arguments of :func:`~tokenenv.game.build.build_game`.

    Raises:
        UserError: a value is unknown or contradicts another one.
    """

    metadata = {  # noqa: RUF012  (Gymnasium's own form)
        "render_modes": RENDER_MODES,
        "render_fps": 1,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }
    rules: ClassVar[str]

    def __init__(
        self,
        num_envs: int = 1,
        *,
        output: Literal["numpy", "torch"] = "numpy",
        render_mode: str | None = None,
        max_episode_steps: int | None = None,
        **game: Any,
    ) -> None:
        EzPickle.__init__(self, num_envs, output=output, render_mode=render_mode, **game)
        check_choice("output", output, ("numpy", "torch"))
        also = ("num_envs", "output", "render_mode", "max_episode_steps")
        self._play = open_play(self.rules, render_mode, game, num_envs, also)
        self.game = self._play.game
        self.max_cycles = self.game.steps
        check_time_limit(max_episode_steps, self.max_cycles)
        self._return: Tensor
        self._length: int
        self.num_envs, self.output, self.render_mode = num_envs, output, render_mode
        self.single_observation_space = self._play.observation_space
        self.single_action_space = self._play.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    @in_turn
    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start with the next images, or with those that ``options`` name.

        Args:
            seed: restarts the order of the images.
            options: ``index``, ``label`` or ``file``, one for all images or ``B`` of them, see
                :func:`~tokenenv.envs.chosen.chosen_batch`. They hold for one episode each.

        Returns:
            ``(B, ...)`` float32 observations, and infos.

        Raises:
            UserError: a negative seed, or options that name no image.
        """
        super().reset(seed=seed)
        if seed is not None or self._play.needs_seed:
            seed = self.np_random_seed
            assert seed is not None
            self._play.seed(seed)
        observation = self._start(options)
        return self._out(observation), self._out(self._info())

    @in_turn
    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Play one decision.

        Args:
            actions: an element of :attr:`action_space`, array or tensor.

        Returns:
            Observations ``(B, ...)`` and rewards ``(B,)`` float32, terminations and truncations
            ``(B,)`` bool, infos.

        Raises:
            UserError: wrong shape or value, or no episode was started.
        """
        observation, reward, over = self._play.step(actions)
        total = reward.sum(1)
        self._return = self._return + total
        self._length += 1
        infos: dict[str, Any] = {}
        if over:
            length = torch.full_like(total, self._length, dtype=torch.int64)
            final = self._info() | self._masked(
                {"episode": self._masked({"r": self._return, "l": length})}
            )
            infos = self._masked({"final_obs": observation, "final_info": final})
            observation = self._start()
        ended = torch.full_like(total, over, dtype=torch.bool)
        never = torch.zeros_like(ended)
        infos |= self._info()
        observations, rewards, terminations, truncations, infos = self._out(
            (observation, total, ended, never, infos)
        )
        if over and self.output == "numpy":
            infos["final_obs"] = _as_objects(infos["final_obs"])
        return observations, rewards, terminations, truncations, infos

    def action_masks(self) -> Any:
        """Which actions are legal: ``(B, n)``, or ``(B, 2 A)``: 0 and 1 of agent 0, of 1, ..."""
        return self._out(self._play.legal.flatten(1))

    def render(self) -> tuple[Any, ...] | None:
        """One picture or text per image; None in human mode."""
        frames = tuple(self._play.draw(row) for row in range(self.num_envs))
        return None if self.render_mode == "human" else frames

    def _start(self, options: dict[str, Any] | None = None) -> Tensor:
        observation = self._play.reset(options)
        self._return = observation.new_zeros(self.num_envs)
        self._length = 0
        return observation

    def _info(self) -> dict[str, Any]:
        play = self._play
        info = {
            "tokens_left": play.tokens_left,
            "illegal_actions": play.illegal.sum(1),
            "correct": play.correct,
            "dense_correct": play.dense_correct,
        }
        return self._masked(info if play.by_count else {"active_mask": play.active} | info)

    def _masked(self, values: dict[str, Any]) -> dict[str, Any]:
        """Gymnasium's form: for each key a mask ``_key``, which images have it; here all do."""
        every = self._return.new_ones(self.num_envs, dtype=torch.bool)
        return values | {f"_{key}": every.clone() for key in values}

    def _out(self, value: Any) -> Any:
        """``value`` with its tensors as arrays, unless the output is torch."""
        if self.output == "torch":
            return value
        if isinstance(value, dict):
            return {key: self._out(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return tuple(self._out(item) for item in value)
        return value.cpu().numpy()


def _as_objects(array: NDArray[Any]) -> NDArray[np.object_]:
    """``(B,)`` object array of the rows of ``array``."""
    rows = np.empty(len(array), dtype=object)
    rows[:] = list(array)
    return rows
