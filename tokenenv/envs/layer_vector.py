"""The games with one agent per block as Gymnasium ``VectorEnv``, a batch of images each."""

from __future__ import annotations

from typing import ClassVar

from tokenenv.envs.vector_base import GameVectorEnv


class LayerMergeVectorEnv(GameVectorEnv):
    """One batched game of ``num_envs`` images; each image is one environment of the vector.

    The game is described at :class:`~tokenenv.envs.layer_merge_gym.LayerMergeEnv`; see
    :class:`~tokenenv.envs.vector_base.GameVectorEnv` for the arguments and the form of ``infos``.

    Example:
        >>> import gymnasium as gym
        >>> import tokenenv
        >>> envs = gym.make_vec("tokenenv/LayerMerge-v0", num_envs=2, max_cycles=1)
        >>> observations, infos = envs.reset(seed=0)
        >>> observations, rewards, terminations, truncations, infos = envs.step([0, 4])
        >>> terminations, infos["final_info"]["tokens_left"]
        (array([ True,  True]), array([64, 52]))
    """

    rules: ClassVar[str] = "layer_merge"


class LayerPruneVectorEnv(GameVectorEnv):
    """One batched game of ``num_envs`` images; each image is one environment of the vector.

    The game is described at :class:`~tokenenv.envs.layer_prune_gym.LayerPruneEnv`; see
    :class:`~tokenenv.envs.vector_base.GameVectorEnv` for the arguments and the form of ``infos``.

    Example:
        >>> import gymnasium as gym
        >>> import tokenenv
        >>> envs = gym.make_vec("tokenenv/LayerPrune-v0", num_envs=2, max_cycles=1)
        >>> observations, infos = envs.reset(seed=0)
        >>> observations, rewards, terminations, truncations, infos = envs.step([0, 4])
        >>> terminations, infos["final_info"]["tokens_left"]
        (array([ True,  True]), array([64, 56]))
    """

    rules: ClassVar[str] = "layer_prune"
