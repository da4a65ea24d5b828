"""A clone of an environment repeats what the original does, and neither moves the other."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import load_env_creator
from helpers import PLAYS, backbone, moves, rounds, same, small
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenenv import UserError, build_game
from tokenenv.envs.ids import IDS, EnvId
from tokenenv.suite.opened import OpenTask
from tokenenv.suite.tasks import find_task

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

FACES = [
    pytest.param(entry, face, id=f"{entry.id}-{face}")
    for entry in IDS
    for face in PLAYS
    if getattr(entry, face)
]


def make(entry: EnvId, face: str, **kwargs: Any) -> Any:
    return load_env_creator(getattr(entry, face))(**small(**kwargs))


def go_on(env: Any, face: str, seed: int, steps: int) -> list[Any]:
    """All that ``steps`` further actions give; a new episode begins where one has ended."""
    heard: list[Any] = []
    if face in ("env", "vector_env"):
        space = env.action_space if face == "env" else env.single_action_space
        stream = moves(seed, space)
        for _ in range(steps):
            action = next(stream)
            heard.append(env.step(action if face == "env" else np.stack([action] * env.num_envs)))
            heard += [env.action_masks(), env.action_space.sample()]
            if face == "env" and heard[-3][2]:
                heard.append(env.reset())
        return heard
    for action in rounds(seed, env):
        by_name = dict(zip(env.possible_agents, action.tolist(), strict=True))
        for _ in range(steps):
            if not env.agents:
                heard.append(env.reset())
            if face == "parallel":
                heard.append(env.step(by_name))
            else:
                agent = env.agent_selection
                env.step(None if env.terminations[agent] else by_name[agent])
                heard.append([env.rewards, env.infos, env.terminations, list(env.agents)])
                heard.append([env.last(), env.agent_selection] if env.agents else None)
            heard += [env.state(), env.action_space(env.possible_agents[0]).sample()]
        return heard
    raise AssertionError


@pytest.mark.parametrize(("entry", "face"), FACES)
@settings(max_examples=3, deadline=None)
@given(before=st.integers(0, 5), seed=st.integers(0, 99))
def test_a_clone_repeats_what_the_original_does(
    entry: EnvId, face: str, before: int, seed: int
) -> None:
    kwargs = {"num_envs": 2} if face == "vector_env" else {}
    env = make(entry, face, **kwargs)
    env.reset(seed=seed)
    draws = face in ("env", "vector_env")
    (env.action_space if draws else env.action_space(env.possible_agents[0])).seed(seed)
    go_on(env, face, seed, before)
    steps = 70 if face == "aec" else 5  # beyond the end of the episode
    clone, other = env.clone(), env.clone()
    assert type(clone) is type(env)
    go_on(other, face, seed + 1, steps)
    heard = go_on(env, face, seed + 2, steps)
    assert same(heard, go_on(clone, face, seed + 2, steps))


@pytest.mark.parametrize("face", ["parallel", "aec"])
def test_agents_that_left_stay_away_in_a_clone(face: str) -> None:
    env = make(IDS[0], face, on_prune="remove")
    env.reset(seed=0)
    env.action_space("token_0").seed(0)
    go_on(env, face, 3, 1 if face == "parallel" else 80)
    assert 0 < len(env.agents) < len(env.possible_agents)
    clone = env.clone()
    assert clone.agents == env.agents
    assert same(go_on(env, face, 5, 40), go_on(clone, face, 5, 40))


def test_a_clone_of_a_clone_and_one_before_the_first_reset() -> None:
    env = gym.make("tokenenv/LayerMerge-v0", **small()).unwrapped
    early = env.clone()
    assert same(early.reset(seed=3), env.reset(seed=3))
    twice = env.clone().clone()
    assert same(env.step(1), twice.step(1))


def test_pictures_of_a_clone_show_its_own_decisions() -> None:
    env = gym.make("tokenenv/TokenPrune-v0", render_mode="rgb_array", **small()).unwrapped
    env.reset(seed=0)
    env.step(np.arange(64) % 2)
    clone = env.clone()
    frame = env.render()
    clone.step(np.zeros(64, np.int64))
    assert np.array_equal(frame, env.render())
    assert not np.array_equal(frame, clone.render())


def test_the_model_and_the_images_are_shared() -> None:
    env = make(IDS[1], "env")
    env.reset(seed=0)
    clone = env.clone()
    assert clone.game is not env.game and clone.game.backbone is env.game.backbone
    assert clone.game.source is env.game.source
    assert clone.game.images.data_ptr() == env.game.images.data_ptr()
    assert clone._play.game is clone.game and clone._play.busy is not env._play.busy


def test_a_game_is_cloned_without_its_face() -> None:
    game = build_game(**small(rules="layer_merge", batch_size=3))
    game.reset()
    twin = game.clone()
    action = np.array([[1], [2], [3]])
    one, other = (each.step(twin.images.new_tensor(action).long()) for each in (game, twin))
    assert same(vars(one.observation), vars(other.observation))
    assert same(one.reward, other.reward) and twin.episode is not game.episode


def test_cloned_and_restored_episodes_count_in_a_suite() -> None:
    # A planner that plays an episode many times would otherwise learn beyond its budget.
    spec = find_task("digits-merge-v1")
    options = small()
    task = OpenTask(spec, backbone(), options["data"], options["data"])
    game = task.game(batch_size=4)
    game.reset()
    assert task.played == 4
    snapshot = game.snapshot()
    game.clone()
    assert task.played == 8
    game.restore(snapshot)
    assert task.played == 12
    envs = task.make_vec(4)
    envs.reset(seed=0)
    clone = envs.clone()
    assert task.played == 16  # those of the original; the clone's count when its next ones start
    clone.reset(seed=0)
    assert task.played == 20
    task.played = spec.budget
    with pytest.raises(UserError, match="budget"):
        game.clone()
