"""A learner on Gymnasium's vector environment in the suite: REINFORCE in plain PyTorch.

tokenenv suite run scenes-prune-v1 --learner examples/extend/suite_own_learner_gym.py:learn
"""

from __future__ import annotations

import torch

from tokenenv.game.policy import Policy
from tokenenv.suite import policy_from
from tokenenv.suite.opened import OpenTask


def learn(task: OpenTask, seed: int) -> list[Policy]:
    """Three policies, each for its own price of a token, from a third of the budget each."""
    torch.manual_seed(seed)
    return [train(task, seed, beta) for beta in (3e-4, 1e-3, 3e-3)]


def train(task: OpenTask, seed: int, beta: float, images: int = 64) -> Policy:
    game = {"features": ("token", "position"), "share": False, "reward": "cooperative"}
    envs = task.make_vec(images, output="torch", reward_kwargs={"beta": beta}, **game)
    width = envs.single_observation_space.shape[-1]
    net = torch.nn.Sequential(torch.nn.Linear(width, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))
    adam = torch.optim.Adam(net.parameters(), lr=1e-2)
    seen = envs.reset(seed=seed)[0]
    for _ in range(task.spec.budget // 3 // images - 1):
        logp, total = 0.0, 0.0
        for _ in range(envs.max_cycles):
            chance = torch.distributions.Categorical(logits=net(seen))
            action = chance.sample()
            logp = logp + chance.log_prob(action) * (seen != 0).any(-1)
            seen, reward_now, *_ = envs.step(action)
            total = total + reward_now
        loss = -(logp * ((total - total.mean()) / (total.std() + 1e-6))[:, None]).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return policy_from(net, envs.game)
