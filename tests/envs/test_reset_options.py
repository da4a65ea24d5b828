"""Which image an episode plays, how long it is, and what wrappers and copies make of it."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import load_env_creator
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from helpers import PLAYS, same, small, source

from tokenenv import UserError, token_prune_v0
from tokenenv.envs.ids import IDS, EnvId

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ROOT = Path(__file__).parents[2]
FACES = [pytest.param(entry, face, id=f"{entry.id}-{face}") for entry in IDS for face in PLAYS]
MULTI_AGENT = [pytest.param(entry, id=entry.id) for entry in IDS]


def make(entry: EnvId, face: str, **kwargs: Any) -> Any:
    return load_env_creator(getattr(entry, face))(**small(**kwargs))


def index(env: Any) -> list[int]:
    return env.unwrapped.game.index.tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(("entry", "face"), FACES)
def test_an_image_is_named_by_index_file_or_label(entry: EnvId, face: str) -> None:
    env = make(entry, face)
    env.reset(seed=0, options={"index": np.int64(5)})
    assert index(env) == [5]
    env.reset(options={"file": source().files[7]})
    assert index(env) == [7]
    for _ in range(3):
        before = index(env)
        env.reset(options={"label": 4})
        assert env.unwrapped.game.labels.tolist() == [4] and index(env) != before
    env.reset(seed=0, options={})
    first = index(env)
    env.reset(seed=0)
    assert index(env) == first  # no option is the next image


@pytest.mark.parametrize(("entry", "face"), FACES)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"indx": 5}, "unknown option 'indx' of reset: choose from index, label, file"),
        ({"reset_mask": True}, "unknown option 'reset_mask'"),
        ({"index": 100}, "index=100 is not in 'digits:train': choose 0 to 99"),
        ({"index": -1}, "index=-1 is not in"),
        ({"index": "5"}, "index='5' is not a whole number"),
        ({"index": [1, 2, 3]}, "option 'index' has 3 values for 1 images: give 1, or one"),
        ({"label": 11}, "no readable image of label=11: choose from 0 to 9"),
        ({"file": "nowhere.png"}, "file='nowhere.png' is not in 'digits:train': give a name such"),
        ({"index": 1, "label": 2}, "index and label both name images: give one of them"),
    ],
)
def test_options_that_name_no_image(
    entry: EnvId, face: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=r"^[^\n]+$") as caught:
        make(entry, face).reset(seed=0, options=options)
    assert words in str(caught.value)


def test_a_batch_takes_one_value_for_each_image_or_one_for_all() -> None:
    envs = gym.make_vec(IDS[1].id, num_envs=3, max_cycles=1, **small())
    envs.reset(seed=0, options={"index": [4, 9, 4]})
    assert index(envs) == [4, 9, 4]
    envs.reset(options={"label": [1, 2, 1]})
    assert envs.unwrapped.game.labels.tolist() == [1, 2, 1]  # type: ignore[attr-defined]
    assert len(set(index(envs))) == 3
    envs.reset(options={"index": 8})
    assert index(envs) == [8, 8, 8]
    envs.step(np.zeros(3, int))  # the episodes that start by themselves are the next images
    assert index(envs) != [8, 8, 8]


def test_a_label_is_drawn_in_the_order_of_the_seed() -> None:
    env = make(IDS[0], "env")
    drawn = []
    for seed in (3, 3, 4):
        env.reset(seed=seed, options={"label": 2})
        drawn.append(index(env))
        for _ in range(3):
            env.reset(options={"label": 2})
            drawn[-1] += index(env)
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 4


def test_options_of_stable_baselines3() -> None:
    pytest.importorskip("stable_baselines3")
    from tokenenv.envs.sb3 import SB3VecEnv

    envs = SB3VecEnv(IDS[0].id, 2, **small())
    envs.set_options([{"index": 3}, {"index": 6}])
    envs.reset()
    assert index(envs.envs) == [3, 6]
    envs.set_options([{"index": 3}, {}])
    with pytest.raises(UserError, match="give every environment the same ones"):
        envs.reset()
    assert envs.get_attr("action_space") == [envs.action_space] * 2
    assert envs.get_attr("observation_space", [0]) == [envs.observation_space]
    assert envs.get_attr("max_cycles") == [3, 3]


def test_options_of_images_that_are_repeated() -> None:
    pytest.importorskip("stable_baselines3")
    from tokenenv.envs.sb3 import SB3VecEnv

    envs = SB3VecEnv(IDS[0].id, 4, **small(repeats=2))
    for options, expected in (
        ({"index": 3}, [3, 3, 3, 3]),
        ([{"index": 3}, {"index": 3}, {"index": 6}, {"index": 6}], [3, 3, 6, 6]),
    ):
        envs.set_options(options)
        envs.reset()
        assert index(envs.envs) == expected
    for given, words in (
        ([3, 6, 3, 6], "different values for the repeats of an image: give each value repeats=2"),
        ([3, 6], "'index' has 2 values for 4 images: give 4, or one"),
    ):
        with pytest.raises(UserError, match=words):
            envs.envs.reset(options={"index": given})


@pytest.mark.parametrize("entry", IDS, ids=lambda entry: entry.id)
def test_a_time_limit_that_would_cut_an_episode(entry: EnvId) -> None:
    words = "max_episode_steps=2 is less than the episode's 3 decisions: give max_cycles=2 instead"
    settings = small(max_cycles=3)
    for limited in (
        lambda: gym.make(entry.id, max_episode_steps=2, **settings),
        lambda: gym.make_vec(entry.id, max_episode_steps=2, **settings),
        lambda: gym.make_vec(entry.id, vectorization_mode="sync", max_episode_steps=2, **settings),
    ):
        with pytest.raises(UserError, match=words):
            limited()
    spec = gym.make(entry.id, max_episode_steps=3, **settings).spec
    assert spec is not None
    spec.max_episode_steps = 2
    with pytest.raises(UserError, match=words):
        gym.make(spec)
    for limit in (None, -1, 3):
        env = gym.make(entry.id, max_episode_steps=limit, **settings)
        assert len(PLAYS["env"](env, 0, episodes=1)) == 4


@pytest.mark.parametrize("entry", IDS, ids=lambda entry: entry.id)
def test_gymnasiums_statistics_of_a_batch(entry: EnvId) -> None:
    """Every episode's return and length, of which older Gymnasiums left out the first step."""
    plain = gym.make_vec(entry.id, num_envs=2, max_cycles=2, **small())
    counted = RecordEpisodeStatistics(gym.make_vec(entry.id, num_envs=2, max_cycles=2, **small()))
    plain.reset(seed=0), counted.reset(seed=0)
    action = np.ones_like(plain.action_space.sample())
    for _ in range(3):
        first, second = plain.step(action), plain.step(action)
        counted.step(action)
        infos = counted.step(action)[-1]
        assert infos["episode"]["l"].tolist() == [2, 2]
        assert infos["episode"]["r"] == pytest.approx(first[1] + second[1])


def test_the_lowest_gymnasium_is_one_that_counts_right() -> None:
    command = [sys.executable, str(ROOT / ".ci" / "minimum.py")]
    lowest = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    (version,) = (line.split("==")[1] for line in lowest if line.startswith("gymnasium=="))
    assert tuple(map(int, version.split("."))) >= (1, 4)


@pytest.mark.parametrize("entry", MULTI_AGENT)
def test_a_deep_copy_has_to_be_reset(entry: EnvId) -> None:
    env = make(entry, "aec")
    env.reset(seed=0)
    other = copy.deepcopy(env)
    with pytest.raises(AttributeError, match="cannot be accessed before reset"):
        print(other.agents)
    with pytest.raises(AssertionError, match=r"reset\(\) needs to be called before step"):
        other.step(0)
    env.step(0)  # the original goes on
    assert same(PLAYS["aec"](other, 3), PLAYS["aec"](env, 3))
    assert copy.deepcopy(env.env.env).agents == []


@pytest.mark.parametrize("entry", MULTI_AGENT)
def test_parallel_environments_have_gymnasiums_random_generator(entry: EnvId) -> None:
    env, other = make(entry, "parallel"), make(entry, "parallel")
    assert isinstance(env.np_random, np.random.Generator)
    env.reset(seed=5), other.reset(seed=5)
    assert env.np_random_seed == 5
    assert env.np_random.integers(1 << 30) == other.np_random.integers(1 << 30)
    other.reset()
    assert other.np_random_seed == 5
    fresh = make(entry, "parallel")
    fresh.reset()
    env.reset(seed=fresh.np_random_seed)
    assert index(env) == index(fresh)


def test_a_wrapped_environment_keeps_its_name() -> None:
    assert str(token_prune_v0.env(**small())) == "token_prune_v0"
