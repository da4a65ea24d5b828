"""Tianshou's DQN for agents that take turns, through its AEC wrapper.

    pip install 'tokenenv[tianshou]'
    python examples/tianshou_dqn.py --updates 12 --seed 0

One agent per block chooses how many tokens are merged there, and all share one network. Tianshou
takes the next agent's observation as the result of an action, which is right in games played in
turn (``layer_merge_v0``, ``layer_prune_v0``). In ``token_prune_v0`` all agents act at once, and
only the last one asked would get a reward.

The curve is unsteady, because one misclassified image costs what several others earn. More updates
did not help; ``sb3_maskable_ppo.py`` learns the same game better.
"""

from __future__ import annotations

import argparse
import logging

import numpy as np
import torch
from tianshou.algorithm import DQN
from tianshou.algorithm.modelfree.dqn import DiscreteQLearningPolicy
from tianshou.algorithm.multiagent.marl import MultiAgentOffPolicyAlgorithm
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Collector, VectorReplayBuffer
from tianshou.env import DummyVectorEnv, PettingZooEnv
from tianshou.utils.net.common import Net
from tianshou.utils.torch_utils import policy_within_training_step

from tokenenv import Backbone, layer_merge_v0, load_backbone


def make(backbone: Backbone, split: str) -> PettingZooEnv:
    """One image; Tianshou reads legal actions from the observation (``mask_in="obs"``)."""
    return PettingZooEnv(layer_merge_v0.env(model=backbone, split=split, mask_in="obs"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--copies", type=int, default=8, help="images played beside each other")
    parser.add_argument("--episodes", type=int, default=32, help="per update")
    parser.add_argument("--test-episodes", type=int, default=100)
    args = parser.parse_args()
    logging.getLogger("tianshou").setLevel(logging.ERROR)  # it warns of a reward for each agent
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    backbone = load_backbone()
    envs = DummyVectorEnv([lambda: make(backbone, "train") for _ in range(args.copies)])
    tests = DummyVectorEnv([lambda: make(backbone, "test") for _ in range(args.copies)])
    envs.seed(args.seed)
    tests.seed(args.seed)
    single = make(backbone, "train")
    width = single.observation_space["observation"].shape
    policy = DiscreteQLearningPolicy(
        model=Net(state_shape=width, action_shape=single.action_space.n, hidden_sizes=[64, 64]),
        action_space=single.action_space,
    )
    shared = DQN(
        policy=policy,
        optim=AdamOptimizerFactory(lr=5e-4),
        gamma=1.0,
        target_update_freq=240,  # each of the 12 agents' parts of 20 batches counts
    )
    agents = len(single.agents)
    learner = MultiAgentOffPolicyAlgorithm(algorithms=[shared] * agents, env=single)
    buffer = VectorReplayBuffer(20_000, args.copies)
    collector = Collector(learner, envs, buffer, exploration_noise=True)
    test = Collector(learner, tests)

    def evaluate() -> float:
        found = test.collect(n_episode=args.test_episodes, reset_before_collect=True)
        return found.returns.sum(-1).mean()

    print(f"Tianshou DQN: {agents} agents, one per block, on {args.copies} images")
    collector.reset()
    print(f"held-out images before: mean return {evaluate():.2f}")
    for update in range(1, args.updates + 1):
        # Not eps_training: with several agents, Tianshou does not set the policies to training.
        policy.set_eps_inference(max(0.05, 1 - update / (0.7 * args.updates)))
        found = collector.collect(n_episode=args.episodes)
        with policy_within_training_step(learner.policy):
            for _ in range(20):
                learner.update(buffer, sample_size=512)
        if update % max(1, args.updates // 10) == 0:
            print(f"update {update:4d}  mean return {found.returns.sum(-1).mean():.2f}")
    print(f"held-out images after:  mean return {evaluate():.2f}")


if __name__ == "__main__":
    main()
