"""stable-baselines3's PPO and sb3-contrib's MaskablePPO on a game with one agent per image.

    pip install 'tokenenv[sb3]'
    python examples/sb3_maskable_ppo.py --algorithm maskable --updates 20 --seed 0

In every block the agent chooses how many tokens are merged. ``SB3VecEnv`` plays a batch of images
at once. The trained policy is then evaluated on held-out images like any other policy.
"""

from __future__ import annotations

import argparse

import numpy as np
from sb3_contrib import MaskablePPO
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

from agents.policies.sb3 import SB3Policy
from tokenenv import open_source
from tokenenv.cli.options import positive
from tokenenv.envs.sb3 import SB3VecEnv
from tokenenv.measure import evaluate

ALGORITHMS = {"ppo": PPO, "maskable": MaskablePPO}


class Curve(BaseCallback):
    """Remembers and prints the mean return of the episodes of each rollout."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every, self.returns = every, list[float]()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.returns.append(float(np.mean([info["r"] for info in self.model.ep_info_buffer])))
        if len(self.returns) % self.every == 0:
            print(f"update {len(self.returns):4d}  mean return {self.returns[-1]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--algorithm", choices=list(ALGORITHMS), default="maskable")
    parser.add_argument("--updates", type=positive, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-envs", type=positive, default=64, help="images in a batch")
    args = parser.parse_args()
    envs = SB3VecEnv("tokenenv/LayerMerge-v0", num_envs=args.num_envs)
    game = envs.envs.game
    learner = ALGORITHMS[args.algorithm](
        "MlpPolicy", envs, n_steps=game.steps, batch_size=game.steps * args.num_envs // 4,
        learning_rate=1e-3, gamma=1.0, stats_window_size=args.num_envs, seed=args.seed,
        device="cpu",
    )  # fmt: skip
    print(f"SB3 {type(learner).__name__} on tokenenv/LayerMerge-v0, {args.num_envs} images")
    curve = Curve(max(1, args.updates // 10))
    learner.learn(args.updates * game.steps * args.num_envs, callback=curve)
    print(f"mean return before {curve.returns[0]:.2f}, after {curve.returns[-1]:.2f}")
    images = open_source("digits", game.backbone.model, split="test")
    found = evaluate(game.backbone, SB3Policy(learner, game), images).report()
    print(
        f"held-out images: top-1 {found['top1']:.2f} % (dense {found['top1_dense']:.2f} %), "
        f"{100 * (1 - found['gmacs'] / found['gmacs_dense']):.1f} % of the multiply-adds saved"
    )


if __name__ == "__main__":
    main()
