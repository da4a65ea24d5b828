"""BenchMARL's MAPPO on the token game, through its Task class.

    pip install 'tokenenv[benchmarl]'
    python examples/benchmarl_mappo.py --updates 20 --seed 0

Any other of BenchMARL's algorithms for discrete actions goes in the place of ``MappoConfig``.
"""

from __future__ import annotations

import argparse
import tempfile

from benchmarl.algorithms import MappoConfig
from benchmarl.experiment import Callback, Experiment, ExperimentConfig
from benchmarl.models.mlp import MlpConfig
from tensordict import TensorDictBase
from tqdm import tqdm

from tokenenv.envs.benchmarl import GameTask


class Curve(Callback):
    """Prints the mean return of the collected episodes."""

    def __init__(self) -> None:
        super().__init__()
        self.returns: list[float] = []

    def on_batch_collected(self, batch: TensorDictBase) -> None:
        """BenchMARL calls this after each rollout."""
        over = batch["next", "done"][..., 0]
        self.returns.append(batch["next", "agents", "episode_reward"][over].mean().item())
        left = batch["next", "info", "tokens_left"][over].float().mean().item()
        tqdm.write(
            f"update {len(self.returns):4d}  mean return {self.returns[-1]:.3f}  tokens {left:.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-envs", type=int, default=64, help="images in a batch")
    parser.add_argument("--save", default=None, help="BenchMARL's folder; default: a temporary one")
    args = parser.parse_args()
    task = GameTask.TOKEN_PRUNE.get_task(
        config={"reward": "cooperative", "reward_kwargs": {"beta": 0.2, "shared": True}}
    )
    config = ExperimentConfig.get_from_yaml()
    config.max_n_frames, config.max_n_iters = None, args.updates
    config.on_policy_n_envs_per_worker = args.num_envs
    config.on_policy_collected_frames_per_batch = args.num_envs * 12  # 4 episodes of 3 steps
    config.on_policy_minibatch_size = args.num_envs * 3
    config.on_policy_n_minibatch_iters = 4
    config.lr, config.gamma, config.clip_grad_val = 2e-3, 1.0, 0.5
    config.evaluation, config.render, config.loggers = False, False, ["csv"]
    curve = Curve()
    print("BenchMARL MAPPO on tokenenv/TokenPrune-v0")
    with tempfile.TemporaryDirectory() as temporary:
        config.save_folder = args.save or temporary
        Experiment(
            task=task,
            algorithm_config=MappoConfig.get_from_yaml(),
            model_config=MlpConfig.get_from_yaml(),
            critic_model_config=MlpConfig.get_from_yaml(),
            seed=args.seed,
            config=config,
            callbacks=[curve],
        ).run()
    print(f"mean return before {curve.returns[0]:.3f}, after {curve.returns[-1]:.3f}")


if __name__ == "__main__":
    main()
