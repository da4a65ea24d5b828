"""The games as BenchMARL tasks, built on :mod:`tokenenv.envs.torchrl`.

Needs ``pip install 'tokenenv[benchmarl]'``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenenv.envs.torchrl import GROUP, TorchRLEnv
from tokenenv.errors import UserError

try:
    from benchmarl.environments.common import Task, TaskClass
    from tensordict import TensorDictBase
    from torchrl.data import Composite
    from torchrl.envs import EnvBase
except ImportError as error:
    raise UserError("BenchMARL is not installed: pip install 'tokenenv[benchmarl]'") from error


class GameTaskClass(TaskClass):
    """How BenchMARL creates and reads a :class:`~tokenenv.envs.torchrl.TorchRLEnv`.

    Its methods are those of BenchMARL's ``TaskClass``, where they are described.
    """

    def get_env_fun(
        self, num_envs: int, continuous_actions: bool, seed: int | None, device: Any
    ) -> Callable[[], EnvBase]:
        """A function that creates the environment for ``num_envs`` images with this config."""

        def make() -> EnvBase:
            env = TorchRLEnv(IDS[self.name], num_envs, **({"device": device} | self.config))
            if seed is not None:
                env.set_seed(seed)
            return env

        return make

    def supports_continuous_actions(self) -> bool:
        """Whether actions may be continuous: False."""
        return False

    def supports_discrete_actions(self) -> bool:
        """Whether actions may be discrete: True."""
        return True

    def max_steps(self, env: EnvBase) -> int:
        """The number of decisions in an episode."""
        steps: int = env.game.steps
        return steps

    def has_render(self, env: EnvBase) -> bool:
        """Whether the environment can be rendered: False."""
        return False

    def group_map(self, env: EnvBase) -> dict[str, list[str]]:
        """The name of the only group, with the names of all agents."""
        return env.group_map

    # BenchMARL takes specs without the batch dimension.
    def observation_spec(self, env: EnvBase) -> Composite:
        """The spec of the agents' observations, ``(A, F + G)``."""
        return _group(env.full_observation_spec_unbatched, "observation")

    def action_mask_spec(self, env: EnvBase) -> Composite:
        """The spec of the mask of legal actions, ``(A, n)``."""
        return _group(env.full_observation_spec_unbatched, "action_mask")

    def action_spec(self, env: EnvBase) -> Composite:
        """The spec of the agents' actions, ``(A,)``."""
        return env.full_action_spec_unbatched

    def state_spec(self, env: EnvBase) -> Composite:
        """The spec of the image's state for a centralised critic, ``(S,)``."""
        state = env.full_observation_spec_unbatched["state"]
        return Composite({"state": state.clone()}, device=env.device)

    def info_spec(self, env: EnvBase) -> None:
        """None: agents have no infos; :meth:`log_info` reads those of the images."""

    @staticmethod
    def log_info(batch: TensorDictBase) -> dict[str, float]:
        """Means over the ended episodes: tokens left, accuracy, illegal actions."""
        over, info = batch["next", "done"], batch["next", "info"]
        if not over.any():
            return {}
        names = ("tokens_left", "correct", "illegal_actions")
        return {f"game/{name}": info[name][over].float().mean().item() for name in names}

    @staticmethod
    def env_name() -> str:
        """The name under which BenchMARL logs these tasks: ``tokenenv``."""
        return "tokenenv"


class GameTask(Task):
    """The games as BenchMARL's tasks.

    Example:
        >>> from tokenenv.envs.benchmarl import GameTask
        >>> task = GameTask.TOKEN_PRUNE.get_task(config={"reward": "cooperative"})
        >>> make = task.get_env_fun(num_envs=4, continuous_actions=False, seed=0, device="cpu")
        >>> make().batch_size
        torch.Size([4])
    """

    TOKEN_PRUNE = None
    LAYER_MERGE = None
    LAYER_PRUNE = None

    @staticmethod
    def associated_class() -> type[GameTaskClass]:
        """The class that all three tasks are made of."""
        return GameTaskClass

    def get_task(self, config: dict[str, Any] | None = None) -> TaskClass:
        """The task; ``config`` holds arguments of :func:`~tokenenv.game.build.build_game`."""
        return GameTaskClass(name=self.name, config=config or {})


IDS = {
    "TOKEN_PRUNE": "tokenenv/TokenPrune-v0",
    "LAYER_MERGE": "tokenenv/LayerMerge-v0",
    "LAYER_PRUNE": "tokenenv/LayerPrune-v0",
}
"""Registered ids by the names of BenchMARL's tasks."""


def _group(spec: Composite, name: str) -> Composite:
    """The spec with only the entry ``name`` of the agents' group."""
    group = spec[GROUP]
    kept = Composite({name: group[name].clone()}, shape=group.shape, device=group.device)
    return Composite({GROUP: kept}, device=spec.device)
