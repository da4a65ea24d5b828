"""RLlib's PPO with one policy for all agents and two env runners.

    pip install tokenenv && pip install 'ray[rllib]>=2.60'      # in an environment of its own
    python examples/rllib_ppo.py --updates 10 --seed 0

RLlib's own ``ParallelPettingZooEnv`` wraps the PettingZoo parallel environment. Each env runner is
a process with its own copy of the model, and every observation passes through Python;
``torchrl_mappo.py`` is faster.

RLlib pins Gymnasium at 1.2.2, so pip puts that in place of 1.4 and says that tokenenv wants more.
The PettingZoo environments work with it; Gymnasium's RecordEpisodeStatistics around ``make_vec``
counts wrong.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import ray
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.env.wrappers.pettingzoo_env import ParallelPettingZooEnv
from ray.tune.registry import register_env

REWARD = {"reward": "cooperative", "reward_kwargs": {"beta": 0.2, "shared": True}}


def make(config: dict[str, Any]) -> ParallelPettingZooEnv:
    from tokenenv import token_prune_v0

    return ParallelPettingZooEnv(token_prune_v0.parallel_env(**config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=64, help="images in an update")
    args = parser.parse_args()
    # The driver trains, and the two runners play.
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="error")
    register_env("TokenPrune-v0", make)
    batch = args.episodes * 3 * 64  # decisions, agents
    config = (
        PPOConfig()
        .environment("TokenPrune-v0", env_config=REWARD)
        .env_runners(num_env_runners=2, batch_mode="complete_episodes")
        .multi_agent(
            policies={"shared"},
            policy_mapping_fn=lambda agent, *_, **__: "shared",
            count_steps_by="agent_steps",
        )
        .rl_module(
            rl_module_spec=RLModuleSpec(model_config=DefaultModelConfig(fcnet_hiddens=[64, 64]))
        )
        .training(
            train_batch_size_per_learner=batch,
            minibatch_size=batch // 4,
            num_epochs=4,
            lr=2e-3,
            gamma=1.0,
            use_kl_loss=False,
            clip_param=0.2,
            vf_clip_param=1.0,
            grad_clip=0.5,
        )
        .debugging(seed=args.seed)
    )
    print("RLlib PPO on tokenenv/TokenPrune-v0, two env runners")
    algorithm = config.build_algo()
    returns: list[float] = []
    try:
        for update in range(1, args.updates + 1):
            found = algorithm.train()["env_runners"]
            returns.append(float(np.mean(list(found["agent_episode_returns_mean"].values()))))
            print(f"update {update:4d}  mean return {returns[-1]:.3f}", flush=True)
    finally:
        algorithm.stop()
        ray.shutdown()
    print(f"mean return before {returns[0]:.3f}, after {returns[-1]:.3f}")


if __name__ == "__main__":
    main()
