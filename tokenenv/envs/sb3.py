"""The games as a stable-baselines3 ``VecEnv``: one batched game, no processes.

Needs ``pip install 'tokenenv[sb3]'``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from tokenenv.envs import ids
from tokenenv.envs.vector_base import GameVectorEnv
from tokenenv.errors import UserError

try:
    from stable_baselines3.common.vec_env import VecEnv
except ImportError as error:
    raise UserError("stable-baselines3 is not installed: pip install 'tokenenv[sb3]'") from error


class SB3VecEnv(VecEnv):
    """A batched game for the learners of stable-baselines3 and sb3-contrib.

    All images end together, and the next ones start in the same step. An info dict has the keys
    of the Gymnasium environment's info, and at the end of an episode also
    ``terminal_observation``, ``TimeLimit.truncated`` (always False) and ``episode``, with the
    return ``r`` and length ``l`` that learners log. ``action_masks`` is there for MaskablePPO.

    Args:
        id: a registered id, such as ``tokenenv/LayerMerge-v0``.
        num_envs: number of images B in one batch.
        render_mode: ``human``, ``rgb_array``, ``ansi`` or None, for each image.
        **game: arguments of :func:`~tokenenv.game.build.build_game`.

    Raises:
        UserError: stable-baselines3 is not installed, or a value is unknown or contradicts
            another one.

    Example:
        >>> from stable_baselines3 import PPO
        >>> from tokenenv.envs.sb3 import SB3VecEnv
        >>> envs = SB3VecEnv("tokenenv/LayerPrune-v0", num_envs=8, max_cycles=2)
        >>> learner = PPO("MlpPolicy", envs, n_steps=2, batch_size=16, n_epochs=1, device="cpu")
        >>> learner.learn(16).num_timesteps
        16
    """

    def __init__(
        self, id: str, num_envs: int = 1, *, render_mode: str | None = None, **game: Any
    ) -> None:
        if "output" in game:
            given = game["output"]
            raise UserError(f"output={given!r}: stable-baselines3 takes arrays, leave it out")
        self.envs: GameVectorEnv = ids.vector_class(id)(num_envs, render_mode=render_mode, **game)
        self._actions: NDArray[Any] = np.zeros(0)
        super().__init__(
            num_envs, self.envs.single_observation_space, self.envs.single_action_space
        )

    def reset(self) -> NDArray[np.float32]:
        """Start with the next images, or with those that :meth:`set_options` named.

        A seed given to :meth:`seed` restarts their order.

        Returns:
            ``(B, ...)`` float32 observations.

        Raises:
            UserError: options that name no image, or not of every environment the same.
        """
        observations, infos = self.envs.reset(seed=self._seeds[0], options=self._joint_options())
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = _rows(infos, self.num_envs)
        return observations

    def _joint_options(self) -> dict[str, Any]:
        """The environments' options as those of the batch: a list of values for each name."""
        names = self._options[0].keys()
        for other in self._options:
            if other.keys() != names:
                raise UserError(
                    f"options {other} beside {self._options[0]}: give every environment the same "
                    "ones, as all of a batch start together"
                )
        return {name: [each[name] for each in self._options] for name in names}

    def step_async(self, actions: NDArray[Any]) -> None:
        """Remember ``(B, ...)`` actions for :meth:`step_wait`."""
        self._actions = actions

    def step_wait(
        self,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """Play one decision.

        Returns:
            Observations ``(B, ...)`` and rewards ``(B,)`` float32, ends ``(B,)`` bool, infos.

        Raises:
            UserError: wrong shape or value, or no episode was started.
        """
        observations, rewards, ends, _, infos = self.envs.step(self._actions)
        if not ends.any():
            return observations, rewards, ends, _rows(infos, self.num_envs)
        self.reset_infos = _rows(infos, self.num_envs)
        final = _rows(infos["final_info"], self.num_envs)
        for info, last in zip(final, infos["final_obs"], strict=True):
            info["terminal_observation"] = last
            info["TimeLimit.truncated"] = False
        return observations, rewards, ends, final

    def close(self) -> None:
        """Do nothing: the environment holds no resources."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """An attribute of the batched game, which all images share, once per index.

        Of what the batch has for one image as well, such as ``action_space``, that of one image.
        """
        single = f"single_{attr_name}"
        value = getattr(self.envs, single if hasattr(self.envs, single) else attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of the batched game, for all images; ``indices`` is ignored."""
        setattr(self.envs, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call ``action_masks`` or ``render``; the results of the images in ``indices``.

        Raises:
            UserError: another method: one image can't be played without the others.
        """
        if method_name not in ("action_masks", "render"):
            raise UserError(
                f"method '{method_name}' can't be called for single images of a batch: "
                "choose 'action_masks' or 'render'"
            )
        results = getattr(self.envs, method_name)(*method_args, **method_kwargs)
        return [None if results is None else results[i] for i in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: Any = None) -> list[bool]:
        """Whether each image's environment is wrapped: always False."""
        return [False for _ in self._get_indices(indices)]

    def get_images(self) -> Sequence[NDArray[np.uint8] | None]:
        """A picture ``(H, W, 3)`` of each image, for ``render_mode="rgb_array"``."""
        return self.env_method("render")


def _rows(infos: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Gymnasium's vector infos as one dict of plain values per image."""
    rows: list[dict[str, Any]] = [{} for _ in range(count)]
    for key, values in infos.items():
        if key.startswith("_") or key.startswith("final_"):
            continue
        each = _rows(values, count) if isinstance(values, dict) else values
        for row, value in zip(rows, each, strict=True):
            row[key] = value.item() if isinstance(value, np.generic) else value
    return rows
