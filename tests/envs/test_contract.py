"""What every registered environment promises to learners, line by line, on all its faces."""

from __future__ import annotations

import pickle
import random
import re
from typing import Any

import gymnasium as gym
import numpy as np
import pettingzoo
import pytest
import torch
from gymnasium.envs.registration import load_env_creator
from helpers import PLAYS, play_env, play_parallel, same, small

from tokenenv.envs.ids import IDS, PRESETS, EnvId

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

FACES = [
    pytest.param(entry, face, id=f"{entry.id}-{face}")
    for entry in IDS
    for face in PLAYS
    if getattr(entry, face)
]
MULTI_AGENT = [pytest.param(entry, id=entry.id) for entry in IDS if entry.parallel]
ROSTERS = [
    *(pytest.param(entry, {}, id=entry.id) for entry in IDS if entry.parallel),
    pytest.param(IDS[0], {"on_prune": "remove"}, id=f"{IDS[0].id}-remove"),
]
ALL = [pytest.param(entry, id=entry.id) for entry in IDS]


def make(entry: EnvId, face: str, **kwargs: Any) -> Any:
    return load_env_creator(getattr(entry, face))(**small(**kwargs))


def opening(env: Any) -> tuple[dict[str, int], list[str]]:
    """A first move of all agents of a parallel env, and who may not act after it."""
    everyone = list(env.agents)
    if everyone[0] == "token_0":
        return dict.fromkeys(everyone, 1) | dict.fromkeys(everyone[:5], 0), everyone[:5]
    return dict.fromkeys(everyone, 0) | {everyone[0]: 1}, [everyone[0], *everyone[2:]]


def legal(agents: list[str], gone: list[str]) -> dict[str, int]:
    """A move in which nobody removes anything, and who may not act does 0."""
    idle = 1 if agents[0] == "token_0" else 0
    return dict.fromkeys(agents, idle) | dict.fromkeys(gone, 0)


def numbers(info: dict[str, Any]) -> bool:
    return all(isinstance(v, bool | int | float | np.ndarray | np.generic) for v in info.values())


# 1 -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("entry", MULTI_AGENT)
def test_the_roster_is_fixed(entry: EnvId) -> None:
    env = make(entry, "parallel")
    env.reset(seed=0)
    everyone = list(env.agents)
    first, gone = opening(env)
    observations, rewards, terminations, truncations, infos = env.step(first)
    assert env.agents == everyone == list(observations) == list(rewards) == list(infos)
    assert not any(terminations.values()) and not any(truncations.values())
    for agent in everyone:
        assert bool(observations[agent].any()) == (agent not in gone)
        assert infos[agent]["active_mask"] is (agent not in gone)
        assert infos[agent]["action_mask"][0] == 1
        assert infos[agent]["action_mask"][1:].any() == (agent not in gone)


# 2 -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("entry", MULTI_AGENT)
@pytest.mark.parametrize("mask_in", ["info", "obs", None])
def test_the_mask_is_where_it_was_asked_for(entry: EnvId, mask_in: str | None) -> None:
    env = make(entry, "parallel", mask_in=mask_in)
    observations, infos = env.reset(seed=0)
    agent = env.agents[0]
    assert env.observation_space(agent).contains(observations[agent])
    assert ("action_mask" in infos[agent]) == (mask_in == "info")
    assert isinstance(observations[agent], dict) == (mask_in == "obs")
    mask = {"info": infos, "obs": observations}[mask_in][agent]["action_mask"] if mask_in else None
    if mask is not None:
        assert mask.dtype == np.int8 and mask.shape == (env.action_space(agent).n,)


# 3 -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("entry", MULTI_AGENT)
@pytest.mark.parametrize("face", ["parallel", "aec"])
def test_names_and_spaces(entry: EnvId, face: str) -> None:
    env = make(entry, face)
    env.reset(seed=0)
    assert env.agents == env.possible_agents
    kind = re.fullmatch(r"([a-z]+)_0", env.agents[0])
    assert kind and env.agents == [f"{kind[1]}_{i}" for i in range(len(env.agents))]
    first = env.agents[0]
    for agent in env.agents:
        assert env.observation_space(agent) is env.observation_space(agent)
        assert env.action_space(agent) is env.action_space(agent)
        assert env.observation_space(agent) == env.observation_space(first)
        assert env.action_space(agent) == env.action_space(first)
        assert env.unwrapped.observation_spaces[agent] is env.observation_space(agent)
        assert env.unwrapped.action_spaces[agent] is env.action_space(agent)
    assert env.state_space.contains(env.state())


# 4 -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("entry", MULTI_AGENT)
@pytest.mark.parametrize("seed", range(3))
def test_all_end_in_the_same_step_with_the_same_flag(entry: EnvId, seed: int) -> None:
    env = make(entry, "parallel")
    steps = [heard for heard in play_parallel(env, seed, episodes=1) if len(heard) == 5]
    assert len(steps) == env.max_cycles
    for i, (_, _, terminations, truncations, _) in enumerate(steps):
        assert set(terminations.values()) == {i == env.max_cycles - 1}
        assert set(truncations.values()) == {False}
    assert env.agents == []


# 5 -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("entry", MULTI_AGENT)
def test_illegal_actions_are_counted_and_change_nothing(entry: EnvId) -> None:
    good, bad = make(entry, "parallel"), make(entry, "parallel")
    for env in (good, bad):
        env.reset(seed=0)
    first, gone = opening(good)
    assert same(good.step(first), bad.step(first))
    second = legal(good.agents, gone)
    calm = good.step(second)
    wild = bad.step(second | dict.fromkeys(gone, 1))
    for part in range(4):
        assert same(calm[part], wild[part])
    for agent in good.agents:
        assert calm[4][agent].pop("illegal_actions") == 0
        assert wild[4][agent].pop("illegal_actions") == (agent in gone)
    assert same(calm[4], wild[4])


@pytest.mark.parametrize("entry", MULTI_AGENT)
def test_unknown_and_dead_agents_are_ignored(entry: EnvId) -> None:
    good, odd = make(entry, "parallel"), make(entry, "parallel")
    for env in (good, odd):
        env.reset(seed=1)
    first, gone = opening(good)
    assert same(good.step(first), odd.step(first | {"nobody": 1, f"{gone[0]}999": 0}))
    second = legal(good.agents, gone)
    living = {agent: choice for agent, choice in second.items() if agent not in gone}
    assert same(good.step(second), odd.step(living))


@pytest.mark.parametrize("entry", MULTI_AGENT)
def test_stepping_past_the_end_gives_empty_dicts(entry: EnvId) -> None:
    env = make(entry, "parallel")
    play_parallel(env, 0, episodes=1)
    for actions in ({}, dict.fromkeys(env.possible_agents, 1)):
        assert env.step(actions) == ({}, {}, {}, {}, {})
    assert env.state_space.contains(env.state())


# 6 -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("entry", "kwargs"), ROSTERS)
def test_agents_infos_keep_their_keys(entry: EnvId, kwargs: dict[str, Any]) -> None:
    heard = play_parallel(make(entry, "parallel", **kwargs), 0)
    every = [h[-1] for h in heard if isinstance(h, tuple)]
    keys = set(next(iter(every[0].values())))
    for infos in every:
        for info in infos.values():
            assert set(info) == keys and numbers(info)


@pytest.mark.parametrize("entry", ALL)
def test_a_single_agents_infos_keep_their_keys(entry: EnvId) -> None:
    every = [heard[-1] for heard in play_env(make(entry, "env"), 0)]
    for info in every:
        assert set(info) == set(every[0]) and numbers(info)


# 7 -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("entry", "face"), FACES)
def test_arguments_attributes_and_pickle(entry: EnvId, face: str) -> None:
    env = make(entry, face, max_cycles=2, render_mode="rgb_array")
    copy = pickle.loads(pickle.dumps(env))
    for each in (env, copy):
        assert each.unwrapped.max_cycles == 2
        assert each.unwrapped.render_mode == each.render_mode == "rgb_array"
        assert "rgb_array" in each.metadata["render_modes"]
    assert same(PLAYS[face](env, 3), PLAYS[face](copy, 3))


# 8 -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("entry", ALL)
def test_faces_are_float32_numpy_and_the_native_face_is_torch(entry: EnvId) -> None:
    env = make(entry, "env")
    seen, _ = env.reset(seed=0)
    assert seen.dtype == np.float32 and env.observation_space.contains(seen)
    envs = make(entry, "vector_env", num_envs=2, output="torch")
    seen, infos = envs.reset(seed=0)
    assert seen.dtype == torch.float32 and not seen.is_inference()
    assert all(isinstance(value, torch.Tensor) for value in infos.values())
    if entry.parallel:
        env = make(entry, "parallel")
        seen, _ = env.reset(seed=0)
        assert all(o.dtype == np.float32 for o in seen.values())
        assert env.state().dtype == np.float32


# 9 -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("entry", ALL)
def test_it_is_registered_everywhere(entry: EnvId) -> None:
    assert re.fullmatch(r"tokenenv/[A-Z]\w+-v\d+", entry.id)
    assert isinstance(gym.make(entry.id, **small()), gym.Env)
    envs = gym.make_vec(entry.id, num_envs=2, vectorization_mode="vector_entry_point", **small())
    assert envs.num_envs == 2
    assert envs.metadata["autoreset_mode"] == gym.vector.AutoresetMode.SAME_STEP
    if hasattr(pettingzoo, "register") and entry.parallel:
        assert isinstance(pettingzoo.make("parallel", entry.id, **small()), pettingzoo.ParallelEnv)
        assert isinstance(pettingzoo.make("aec", entry.id, **small()), pettingzoo.AECEnv)


# 10 ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("entry", "face"), FACES)
@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_a_seed_is_a_run(entry: EnvId, face: str, seed: int) -> None:
    one, other = make(entry, face), make(entry, face)
    first = PLAYS[face](one, seed)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert same(first, PLAYS[face](other, seed))
    assert same(first, PLAYS[face](one, seed))
    assert not same(first, PLAYS[face](one, seed + 1))


@pytest.mark.parametrize(("entry", "face"), FACES)
def test_no_global_random_generator_is_touched(entry: EnvId, face: str) -> None:
    env = make(entry, face)
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    PLAYS[face](env, 0)
    after = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    assert same(before, after)


@pytest.mark.parametrize(("entry", "face"), FACES)
def test_unseeded_environments_differ(entry: EnvId, face: str) -> None:
    def images(env: Any) -> list[int]:
        drawn = []
        for _ in range(6):
            env.reset()
            drawn.append(int(env.unwrapped.game.index[0]))
        return drawn

    assert images(make(entry, face)) != images(make(entry, face))


# 13 ----------------------------------------------------------------------------------------------
def test_a_preset_is_its_environment_with_other_defaults() -> None:
    (large,) = PRESETS
    env = gym.make(large.id, max_cycles=1)
    observation, _ = env.reset(seed=0)
    assert observation.shape[0] == 576 and env.unwrapped.game.backbone.classes == 10
    same_env = gym.make(large.of, model="scenes_vit_patch2", max_cycles=1)
    assert same(same_env.reset(seed=0)[0], observation)
    assert gym.make_vec(large.id, num_envs=2).single_action_space.shape == (576,)
    if hasattr(pettingzoo, "make"):
        assert len(pettingzoo.make("parallel", large.id).possible_agents) == 576
    assert gym.make(large.id, **small()).action_space.shape == (64,)
