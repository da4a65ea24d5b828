"""Arguments of environments that can't be meant, and environments that two threads step."""

from __future__ import annotations

import copy
import threading
from typing import Any

import gymnasium as gym
import pettingzoo
import pytest
from helpers import small

from tokenenv import UserError, build_game, layer_merge_v0, token_prune_v0
from tokenenv.errors import UnknownArgument

ID = "tokenenv/TokenPrune-v0"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"model": 5}, "model=5: give timm's name of one, or tokenenv.Backbone"),
        ({"model": None}, "model=None: give"),
        ({"reward_kwargs": 5}, "reward_kwargs=5: give a dict"),
        ({"reward_kwargs": {"beta": "x"}}, "'beta' is 'x', not a finite number"),
        ({"reward": 5}, "reward=5: give a name, an instance"),
        ({"reward": "alpha_bet"}, "did you mean 'alpha_beta'"),
        ({"blocks": 5}, "blocks=5: give a list of block indices"),
        ({"blocks": "3/6"}, "blocks='3/6': give a list"),
        ({"max_cycles": "3"}, "max_cycles='3' is no whole number"),
        ({"features": 5}, "'features' is 5"),
        ({"share": "x"}, "'share' is 'x', not true or false"),
        ({"execution": "fast"}, "execution='fast': choose from masked, padded, packed"),
        ({"privileged": "x"}, "'privileged' is 'x'"),
        ({"repeats": "2"}, "repeats='2' is no whole number"),
        ({"model": "digits_vit", "device": None}, "device 'None' is not available"),
        ({"data": 5}, "data=5 is no path"),
    ],
)
def test_values_that_cannot_be_meant(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        gym.make(ID, **small(**given))


@pytest.mark.parametrize("count", ["4", 4.0, 0, None, 10**9, [2]])
def test_numbers_of_images(count: Any) -> None:
    with pytest.raises(UserError, match=r"num_envs=.* is no whole number from 1 to 65536"):
        gym.make_vec(ID, num_envs=count, **small())


OWN = {
    "gymnasium": (lambda **k: gym.make(ID, **k), ["render_mode"], ["num_envs", "mask_in"]),
    "vector": (lambda **k: gym.make_vec(ID, 2, **k), ["num_envs", "output"], ["mask_in"]),
    "parallel": (token_prune_v0.parallel_env, ["on_prune", "mask_in"], ["num_envs", "output"]),
    "aec": (token_prune_v0.env, ["on_prune", "mask_in"], ["num_envs"]),
    "layers": (layer_merge_v0.parallel_env, ["mask_in", "grid"], ["on_prune"]),
    "game": (build_game, ["batch_size", "rules"], ["render_mode", "num_envs"]),
}


@pytest.mark.parametrize("face", OWN)
def test_an_unknown_argument_is_told_all_that_there_are(face: str) -> None:
    make, own, others = OWN[face]
    with pytest.raises(UnknownArgument, match="unknown argument 'max_cycle'") as caught:
        make(max_cycle=2)  # type: ignore[operator]
    listed = str(caught.value).partition("choose from ")[2].partition(";")[0].split(", ")
    assert {"model", "weights", "data", "reward_kwargs", "features", *own} <= set(listed)
    assert not {"settings", *others} & set(listed)
    assert face == "game" or not {"rules", "batch_size"} & set(listed)
    assert "; did you mean 'max_cycles'?" in str(caught.value)


def test_what_is_unknown_is_told_before_anything_is_loaded() -> None:
    with pytest.raises(UserError, match="unknown argument 'colour'"):
        gym.make(ID, model="no_such_model", colour=1)


@pytest.mark.parametrize("actions", [None, 5, [1, 2], "x"])
@pytest.mark.parametrize("game", [token_prune_v0, layer_merge_v0])
def test_actions_that_are_no_dict(game: Any, actions: Any) -> None:
    env = game.parallel_env(**small())
    env.reset(seed=0)
    with pytest.raises(UserError, match=r"actions=.*: give a dict with the action of each agent"):
        env.step(actions)
    for options in (5, ["index"]):
        with pytest.raises(UserError, match=r"options=.*: give a dict such as"):
            env.reset(options=options)
    with pytest.raises(UserError, match="seed='a' is no whole number"):
        env.reset(seed="a")


def faces() -> dict[str, Any]:
    return {
        "gymnasium": gym.make(ID, **small()),
        "vector": gym.make_vec(ID, num_envs=2, **small()),
        "parallel": token_prune_v0.parallel_env(**small()),
        "layers": layer_merge_v0.parallel_env(**small()),
        "aec": layer_merge_v0.env(**small()),
    }


@pytest.mark.parametrize("face", ["gymnasium", "vector", "parallel", "layers", "aec"])
def test_two_threads_in_one_environment_are_told(face: str) -> None:
    env = faces()[face]
    env.reset(seed=0)
    game, inside, go = env.unwrapped.game, threading.Event(), threading.Event()
    start = game.reset

    def slow(*args: Any) -> Any:
        inside.set()
        assert go.wait(20)
        return start(*args)

    game.reset = slow
    other = threading.Thread(target=env.reset)
    other.start()
    assert inside.wait(20)
    with pytest.raises(UserError, match="another thread is stepping this environment"):
        env.reset()
    go.set()
    other.join(20)
    game.reset = start
    env.reset(seed=1)  # one after the other is fine
    assert isinstance(copy.deepcopy(env), type(env))
    if isinstance(env, pettingzoo.ParallelEnv):
        assert env.agents
