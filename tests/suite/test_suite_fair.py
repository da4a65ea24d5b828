"""Tasks with hulls, results that were edited, replays, budgets, and policies of any training."""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from command_line import mistake
from suite_tasks import TINY, elsewhere, kept, run  # noqa: F401

from agents import ActorPolicy, MAPPOConfig, Widths
from agents.learners.mappo import AgentCritic
from tokenenv import build_game
from tokenenv.errors import UserError
from tokenenv.game.policy import Policy, play
from tokenenv.suite import policy_from, register_task
from tokenenv.suite.opened import open_task
from tokenenv.suite.results import read_result

ROOT = Path(__file__).parents[2]
HULL = dataclasses.replace(TINY, name="tiny-prune-v1", front="hull", grid=(0.01, 1.0))


@pytest.fixture
def tried() -> Path:
    register_task(HULL)
    assert run("run tiny-prune-v1 --learner random --learner heuristic --learner untrained") == 0
    return Path("suite/results/tiny-prune-v1")


def test_fixed_policies_are_spread_over_the_range_as_learners_are(
    tried: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for learner, result in kept(HULL).items():
        inside = [HULL.low <= point["macs"] <= HULL.high for point in result["points"]]
        assert sum(inside) >= 8, learner
    assert run("score suite") == 0
    table = capsys.readouterr().out
    assert "top-1 at 26 / 43 / 60 % of the cost | as dense at 43 %" in table


def test_an_edited_result_is_refused(tried: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tried / "tiny-prune-v1-random-0.json"
    whole = json.loads(path.read_text())
    better = [{**point, "top1": 1.0} for point in whole["points"]]
    for edited, words in (
        ({**whole, "points": better}, "it was edited: its content does not have the sha256"),
        ({**whole, "seed": 7}, "it was edited"),
        ({k: v for k, v in whole.items() if k != "sha256"}, "it has no sha256"),
    ):
        path.write_text(json.dumps(edited))
        assert words in mistake("suite score suite", capfd)
    path.write_text(json.dumps(whole, indent=7))  # another layout is no other content
    assert read_result(path).learner == "random"


def test_a_replay_says_equal_or_what_differs(
    tried: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tried / "tiny-prune-v1-untrained-1.json"
    capsys.readouterr()
    assert run(f"validate {path}") == 0
    assert capsys.readouterr().out == "tiny-prune-v1 untrained seed 1: equal\n"
    assert run("run tiny-prune-v1 --learner mappo --seeds 0") == 0
    assert run(f"validate {tried / 'tiny-prune-v1-mappo-0.json'}") == 0
    stored = read_result(path)
    first = stored.points[0]
    changed = dataclasses.replace(first, macs=first.macs + 1e-4)
    other = dataclasses.replace(stored, points=(changed, *stored.points[1:]))
    path.write_text(json.dumps(other.as_json()))
    assert run(f"validate {path}") == 1
    said = capsys.readouterr().out
    assert "untrained seed 1: differs" in said and f"a cost of {changed.macs:.6f} stored" in said


def test_the_environments_of_a_task_count_its_budget() -> None:
    opened = open_task(dataclasses.replace(TINY, budget=16))
    envs = opened.make_vec(8)
    envs.reset(seed=0)
    keep = envs.action_space.sample() * 0 + 1
    for episode in (1, 2):
        for _ in range(3):
            envs.step(keep)
        assert opened.played == 8 * episode  # the next ones wait, unplayed
    with pytest.raises(UserError, match="plays 24 episodes of 'tiny-prune-v0', whose budget is 16"):
        for _ in range(3):
            envs.step(keep)
    with pytest.raises(UserError, match="has its own data: leave it out"):
        opened.make_vec(8, data="digits")

    alone = open_task(dataclasses.replace(TINY, budget=1)).parallel_env()
    for _ in range(2):
        alone.reset(seed=0)
    with pytest.raises(UserError, match="plays 2 episodes"):
        alone.reset()


def test_a_policy_acts_in_the_suite_as_in_its_environment() -> None:
    torch.manual_seed(0)
    envs: Any = gym.make_vec("tokenenv/TokenPrune-v0", num_envs=8, share=True)
    game = envs.game
    net = torch.nn.Linear(envs.single_observation_space.shape[-1], 2)
    net.bias.data[1] += 0.8  # else it keeps no token
    seen, _ = envs.reset(seed=3)
    images = game.images.clone()
    for _ in range(game.steps):
        with torch.no_grad():
            chosen = net(torch.as_tensor(seen)).argmax(-1)
        seen, *_, infos = envs.step(chosen.numpy())
    left = infos["final_info"]["tokens_left"]
    assert left.min() > 0 and left.max() < 64

    policy: Policy = policy_from(net, game)
    episode = play(game.backbone, policy, images)
    assert (episode.tokens.visual_alive.sum(1).numpy() == left).all()
    same = policy_from(lambda shown: net(shown).argmax(-1), game, macs=5.0)
    again = play(game.backbone, same, images)
    assert torch.equal(again.logits, episode.logits)
    assert same.macs(torch.tensor([3.0]), torch.tensor([1.0])).item() == 15


def test_policies_that_are_none() -> None:
    game = build_game(batch_size=2)
    with pytest.raises(UserError, match="cost of function is not known"):
        policy_from(lambda shown: shown, game)
    with pytest.raises(UserError, match="can't be called"):
        policy_from(3, game)
    wrong = policy_from(lambda shown: shown[..., :1], game, macs=1.0)
    game.reset()
    images = torch.zeros(2, *game.stream.source.shape)
    with pytest.raises(UserError, match=r"float32 of shape \(2, 64, 1\)"):
        play(game.backbone, wrong, images)


def test_a_critic_without_labels_reads_none() -> None:
    game = build_game(batch_size=4)
    widths = Widths(game.agent_dim, game.shared_dim, game.state_dim)
    policy = ActorPolicy(game.rules, widths)
    seen = game.reset()
    assert seen.state is not None
    others = seen.state.clone()
    others[:, -3:-1] = 9.0  # the two numbers that need the label
    for labels in (True, False):
        critic = AgentCritic(policy, MAPPOConfig(steps=game.steps, labels=labels))
        one, other = (
            critic({"agents": seen.agents, "state": state}, None)["action"]
            for state in (seen.state, others)
        )
        assert torch.equal(one, other) == (not labels)


@pytest.mark.parametrize("algorithm", ["a2c", "dqn"])
def test_more_of_stable_baselines3(algorithm: str) -> None:
    pytest.importorskip("stable_baselines3")
    assert run(f"run tiny-merge-v0 --learner sb3:{algorithm} --seeds 0") == 0
    [path] = Path("suite/results/tiny-merge-v0").glob("*.json")
    points = read_result(path).points
    assert len(points) == 3 and all(np.isfinite(point.macs) for point in points)


def test_the_leaderboard_is_what_the_references_say() -> None:
    # The page is generated; what is stored and what is shown must not drift apart.
    found = runpy.run_path(str(ROOT / "benchmarks/leaderboard.py"))
    assert found["PAGE"].read_text() == found["page"]()


def test_the_example_on_the_vector_environment_keeps_to_the_budget() -> None:
    learn = runpy.run_path(str(ROOT / "examples/extend/suite_own_learner_gym.py"))["learn"]
    opened = open_task(dataclasses.replace(HULL, budget=600))
    policies = learn(opened, 0)
    assert len(policies) == 3 and 128 <= opened.played <= 600
    for policy in policies:
        opened.check_policy(policy)
