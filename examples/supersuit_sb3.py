"""stable-baselines3's PPO with a shared policy, through SuperSuit's vector wrappers.

    pip install 'tokenenv[supersuit]'
    python examples/supersuit_sb3.py --updates 20 --seed 0

SuperSuit turns each agent of several copies of the PettingZoo parallel environment into one
environment. The set of agents must be fixed (``on_prune="mask"``, the default). PPO gets no action
mask, so actions of pruned tokens are ignored. Games with one agent per image need no SuperSuit, see
``sb3_maskable_ppo.py``.
"""

from __future__ import annotations

import argparse

import numpy as np
import supersuit
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecEnv, VecMonitor

from tokenenv import load_backbone, token_prune_v0

REWARD = {"reward": "cooperative", "reward_kwargs": {"beta": 0.2, "shared": True}}


class Curve(BaseCallback):
    """Prints the mean return of the episodes of each rollout."""

    def __init__(self) -> None:
        super().__init__()
        self.update, self.returns = 0, list[float]()

    def _on_step(self) -> bool:
        self.returns += [info["episode"]["r"] for info in self.locals["infos"] if "episode" in info]
        return True

    def _on_rollout_end(self) -> None:
        self.update += 1
        print(f"update {self.update:4d}  mean return {np.mean(self.returns):.3f}")
        self.returns = []


def make(copies: int, seed: int, **kwargs: object) -> VecEnv:
    """A stable-baselines3 ``VecEnv`` with an environment for each token of ``copies`` images."""
    single = token_prune_v0.parallel_env(**REWARD, **kwargs)
    each_agent = supersuit.pettingzoo_env_to_vec_env_v1(single)
    # No processes: each would hold the model, and forked ones hang in torch.
    joined = supersuit.concat_vec_envs_v1(each_agent, copies, 0, base_class="stable_baselines3")
    joined.venv.reset(seed=seed)  # SuperSuit's wrapper has no seed()
    return VecMonitor(joined)


def evaluate(learner: PPO, envs: VecEnv, episodes: int) -> float:
    """Mean return of the agents; actions are sampled."""
    returns: list[float] = []
    seen = envs.reset()
    while len(returns) < episodes * envs.num_envs:
        seen, _, _, infos = envs.step(learner.predict(seen)[0])
        returns += [info["episode"]["r"] for info in infos if "episode" in info]
    return float(np.mean(returns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--copies", type=int, default=16, help="images played beside each other")
    args = parser.parse_args()
    set_random_seed(args.seed)
    backbone = load_backbone()
    envs = make(args.copies, args.seed, model=backbone)
    test = make(args.copies, args.seed, model=backbone, split="test")
    steps = 12  # 4 episodes
    learner = PPO(
        "MlpPolicy", envs, n_steps=steps, batch_size=steps * envs.num_envs // 4, n_epochs=4,
        learning_rate=2e-3, gamma=1.0, device="cpu",
    )  # fmt: skip
    print(f"SB3 PPO: each of {envs.num_envs} tokens of {args.copies} images is an environment")
    print(f"held-out images before: mean return {evaluate(learner, test, 10):.3f}")
    learner.learn(args.updates * steps * envs.num_envs, callback=Curve())
    print(f"held-out images after:  mean return {evaluate(learner, test, 10):.3f}")


if __name__ == "__main__":
    main()
