"""Learners of BenchMARL in the suite, on the games of one agent per token (extra benchmarl)."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from tokenenv.errors import UserError
from tokenenv.game.policy import Policy
from tokenenv.suite.called import policy_from
from tokenenv.suite.opened import OpenTask
from tokenenv.suite.tasks import Task

try:
    from benchmarl.algorithms import IppoConfig, MappoConfig, QmixConfig, VdnConfig
    from benchmarl.experiment import Callback, Experiment, ExperimentConfig
    from benchmarl.models.mlp import Mlp, MlpConfig
except ImportError as error:
    raise UserError("BenchMARL is not installed: pip install 'tokenenv[benchmarl]'") from error

from tokenenv.envs.benchmarl import IDS, GameTaskClass
from tokenenv.envs.torchrl import GROUP

_ALGORITHMS = {"mappo": MappoConfig, "ippo": IppoConfig, "qmix": QmixConfig, "vdn": VdnConfig}
_TEAM = ("qmix", "vdn")
"""Those that learn from the mean reward of all agents."""

_IMAGES = 128


def settings(algorithm: str, task: Task) -> dict[str, Any]:
    """BenchMARL's settings that differ from its defaults, as results hold them.

    The reward is ``cooperative`` in the form that pays each agent alone for its token: who learns
    from the mean of the agents' rewards then needs a price that is as many times higher as there
    are agents.
    """
    frames = _IMAGES * task.decisions
    updates = task.budget // _IMAGES
    beta = 1e-3 * (task.agents if algorithm in _TEAM else 1)
    common = {"lr": 3e-3, "gamma": 1.0, "max_n_frames": None, "max_n_iters": updates}
    quiet = {"evaluation": False, "evaluation_episodes": 1, "render": False, "loggers": []}
    on_policy = {
        "on_policy_n_envs_per_worker": _IMAGES,
        "on_policy_collected_frames_per_batch": frames,
        "on_policy_minibatch_size": frames // 4,
        "on_policy_n_minibatch_iters": 4,
    }
    off_policy = {
        "off_policy_n_envs_per_worker": _IMAGES,
        "off_policy_collected_frames_per_batch": frames,
        "off_policy_train_batch_size": frames // 4,
        "off_policy_n_optimizer_steps": 16,
        "off_policy_memory_size": 16 * frames,
        "exploration_anneal_frames": frames * updates // 2,
        "polyak_tau": 0.02,
    }
    return {
        "experiment": common
        | quiet
        | {"create_json": False}
        | (off_policy if algorithm in _TEAM else on_policy),
        "algorithm": {} if algorithm in _TEAM else {"entropy_coef": 1e-3, "lmbda": 0.95},
        "num_cells": [32, 32],
        "game": {"share": False, "reward": "cooperative", "reward_kwargs": {"beta": beta}},
    }


def learn(algorithm: str, opened: OpenTask, seed: int, folder: Path, dtype: str) -> Policy:
    """Train an algorithm of BenchMARL for the task's budget.

    Args:
        algorithm: ``mappo``, ``ippo``, ``qmix`` or ``vdn``.
        opened: the task.
        seed: of the learner and of the order of the images.
        folder: for BenchMARL's files and its output, ``train.log``.
        dtype: precision of the model in training.

    Returns:
        The network that chooses actions, with a threshold.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chosen = settings(algorithm, opened.spec)
    config = _with(ExperimentConfig.get_from_yaml(), chosen["experiment"])
    config.save_folder = str(folder.resolve())
    model = _with(MlpConfig.get_from_yaml(), {"num_cells": chosen["num_cells"]})
    keep = _Keep(opened)
    with (
        open(folder / "train.log", "a") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
        _without_torchrls_notes(),
    ):
        experiment = Experiment(
            task=_Task(opened, dtype, chosen["game"]),
            algorithm_config=_with(_ALGORITHMS[algorithm].get_from_yaml(), chosen["algorithm"]),
            model_config=model,
            critic_model_config=model,
            seed=seed,
            config=config,
            callbacks=[keep],
        )
        keep.now()
        experiment.run()
    return _policy(experiment)


@contextlib.contextmanager
def _without_torchrls_notes() -> Iterator[None]:
    """Keeps what TorchRL logs about its buffers off the terminal."""
    logger = logging.getLogger("torchrl")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


def _with(config: Any, values: dict[str, Any]) -> Any:
    """A configuration of BenchMARL with other values."""
    for name, value in values.items():
        setattr(config, name, value)
    return config


class _Task(GameTaskClass):
    """The task's game, whose episodes count, as BenchMARL creates and reads it.

    BenchMARL writes its tasks to disk; this one goes without model and images.
    """

    def __init__(self, opened: OpenTask, dtype: str, game: dict[str, Any]) -> None:
        super().__init__(name=_NAMES[opened.spec.environment], config=game)
        self._opened, self._dtype = opened, dtype

    def get_env_fun(
        self, num_envs: int, continuous_actions: bool, seed: int | None, device: Any
    ) -> Callable[[], Any]:
        """A function that creates the environment for ``num_envs`` images."""

        def make() -> Any:
            env = self._opened.torchrl_env(num_envs, self._dtype, **self.config)
            env.set_seed(seed)
            return env

        return make

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "config": self.config}


_NAMES = {environment: name for name, environment in IDS.items()}


class _Keep(Callback):  # type: ignore[misc]  # the library has no types
    """Keeps the policies of the stages that are due."""

    def __init__(self, opened: OpenTask) -> None:
        super().__init__()
        self._opened, self._done = opened, 0

    def now(self) -> None:
        """Keep the policy of now, if one is due."""
        episodes = self._done * _IMAGES
        self._opened.keep_stage(lambda: _policy(self.experiment), episodes=episodes)

    def on_train_end(self, training_td: Any, group: str) -> None:
        """BenchMARL calls this after each update."""
        self._done += 1
        self.now()

    def __getstate__(self) -> dict[str, Any]:
        return {}


def _policy(experiment: Experiment) -> Policy:
    """The policy of now, with weights of its own."""
    actor = experiment.algorithm.get_policy_for_loss(GROUP)
    perceptron = next(module for module in actor.modules() if isinstance(module, Mlp)).mlp
    layers: list[nn.Module] = []
    for _, layer in sorted(perceptron.params.items(), key=lambda item: int(item[0])):
        weight, bias = layer["weight"].detach(), layer["bias"].detach()
        linear = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device)
        linear.load_state_dict({"weight": weight, "bias": bias})
        layers += [linear, nn.Tanh()]
    return policy_from(nn.Sequential(*layers[:-1]), experiment.test_env.base_env.game)
