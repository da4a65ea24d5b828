"""The token pruning game with a batch of images as a Gymnasium ``VectorEnv``."""

from __future__ import annotations

from typing import ClassVar

from tokenenv.envs.vector_base import GameVectorEnv


class TokenPruneVectorEnv(GameVectorEnv):
    """One batched game of ``num_envs`` images; each image is one environment of the vector.

    The game is described at :class:`~tokenenv.envs.token_prune_gym.TokenPruneEnv`; see
    :class:`~tokenenv.envs.vector_base.GameVectorEnv` for the arguments and the form of ``infos``.

    Example:
        >>> import gymnasium as gym
        >>> import tokenenv
        >>> envs = gym.make_vec("tokenenv/TokenPrune-v0", num_envs=2, max_cycles=1)
        >>> observations, infos = envs.reset(seed=0)
        >>> observations.shape[:2]
        (2, 64)
        >>> keep_all = envs.action_space.sample() * 0 + 1
        >>> observations, rewards, terminations, truncations, infos = envs.step(keep_all)
        >>> terminations, infos["final_info"]["tokens_left"]
        (array([ True,  True]), array([64, 64]))
    """

    rules: ClassVar[str] = "token_prune"
