"""A learner of your own in the suite: a function of a task and a seed that returns a policy.

    tokenenv suite run digits-prune-v0 --learner examples.suite_own_learner:learn --seeds 0,1
    tokenenv suite score suite

If the policy has a threshold, as here, the suite measures its whole front. A policy without one is
a single point; a list of up to ten policies gives a point for each. Do not train on ``task.test``.
"""

from __future__ import annotations

import torch

from agents import MAPPO, ActorPolicy, MAPPOConfig
from agents.policies.actor import Widths
from tokenenv.suite.opened import OpenTask


def learn(task: OpenTask, seed: int) -> ActorPolicy:
    torch.manual_seed(seed)
    game = task.game(batch_size=64, repeats=4, reward="cooperative", reward_kwargs={"beta": 1e-4})
    game.seed(seed)
    widths = Widths(game.agent_dim, game.shared_dim, game.state_dim)
    policy = ActorPolicy(game.rules, widths, initial=0.9, trained_on=task.spec.model)
    learner = MAPPO(policy, game, MAPPOConfig(steps=game.steps, repeats=4), seed=seed)
    for _ in range(task.spec.budget // game.batch_size):
        learner.update()
    return policy
