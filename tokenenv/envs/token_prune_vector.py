"""Many images at once: the token pruning game as a Gymnasium ``VectorEnv``."""

from __future__ import annotations

from typing import ClassVar

from tokenenv.envs.vector import GameVectorEnv


class TokenPruneVectorEnv(GameVectorEnv):
    """One batched game of ``num_envs`` images, shown as so many environments.

    The game is that of :class:`~tokenenv.envs.token_prune_gym.TokenPruneEnv`. All images end
    together, and the next ones start in the same step (``AutoresetMode.SAME_STEP``): no step is
    spent on resetting.

    At the end of an episode ``infos["final_info"]`` holds what ended, and in addition
    ``episode``, with the episode's return ``r`` and length ``l``. ``infos["final_obs"]`` is all
    zeros: nobody acts on it, and it has no value to bootstrap from, for no episode is truncated.

    Args:
        num_envs: number of images B in one batch.
        output: ``numpy``: arrays, ``final_obs`` in Gymnasium's form, an object array of ``B``
            arrays. ``torch``: tensors on the game's device, ``final_obs`` as one tensor; nothing
            makes an accelerator wait before the end of an episode. Actions may be either.
        render_mode: ``human``, ``rgb_array``, ``ansi`` or None, for each image.
        max_episode_steps: taken because Gymnasium hands it in; it cannot shorten an episode.
        **game: what :func:`~tokenenv.game.build.build_game` takes.

    Raises:
        UserError: a value that is unknown or doesn't go with the others.

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
