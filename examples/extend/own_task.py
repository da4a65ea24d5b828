"""A task of your own in the suite, and a learner that plays it.

    python examples/extend/own_task.py

The task is small, so that it runs in seconds: an agent per pixel of a digit decides twice.
A task is data; results are compared only where all of it is the same, so a change raises
the version in its name.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from agents import MAPPO, ActorPolicy, MAPPOConfig, Widths
from tokenenv.suite import Task, register_task
from tokenenv.suite.opened import OpenTask
from tokenenv.suite.report import make_report
from tokenenv.suite.results import read_result
from tokenenv.suite.run import run_suite

TASK = register_task(
    Task(
        name="digits-twice-v0",
        level="easy",
        environment="tokenenv/TokenPrune-v0",
        rules="token_prune",
        blocks=(3, 6),
        model="digits_vit",
        data="digits",
        test_images=100,
        budget=2048,
        agents=64,
        decisions=2,
        seeds=2,
        low=0.4,
        high=0.7,
        random="random:keep={},blocks=3/6",
        heuristic="cls-attention:keep={},blocks=3/6",
        grid=(0.8, 0.65, 0.5, 0.35, 0.2),
        description="an agent per pixel of a digit decides before two blocks",
    )
)


def learn(task: OpenTask, seed: int) -> ActorPolicy:
    """A policy that MAPPO trained within the task's budget."""
    torch.manual_seed(seed)
    game = task.game(batch_size=64, repeats=4, reward="cooperative", reward_kwargs={"beta": 1e-4})
    game.seed(seed)
    widths = Widths(game.agent_dim, game.shared_dim, game.state_dim)
    policy = ActorPolicy(game.rules, widths, initial=0.9, trained_on=task.spec.model)
    learner = MAPPO(policy, game, MAPPOConfig(steps=game.steps, repeats=4), seed=seed)
    for _ in range(task.spec.budget // game.batch_size):
        learner.update()
    return policy


def main(out: str | Path) -> None:
    """Run the task with the references and the learner above, and print the scores."""
    learners = ["random", "heuristic", f"{__file__}:learn"]
    results = run_suite([TASK.name], learners, out=out)
    print(make_report(map(read_result, results)).as_markdown(), end="")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
