"""What faces hand out is the caller's own, and asked too early they say so."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import moves, rounds, same, small

from tokenenv import UserError, layer_prune_v0, token_prune_v0
from tokenenv.envs.sb3 import SB3VecEnv
from tokenenv.game.rewards import Dora, Turn

IDS = ("TokenPrune", "LayerMerge", "LayerPrune")


def ruin(value: Any) -> None:
    """Write over everything that can be written to."""
    if isinstance(value, dict):
        list(map(ruin, value.values()))
    elif isinstance(value, list | tuple) or (
        isinstance(value, np.ndarray) and value.dtype == object
    ):
        list(map(ruin, value))
    elif isinstance(value, np.ndarray):
        value[...] = 1 - value if value.dtype != bool else ~value
    elif isinstance(value, torch.Tensor):
        value.copy_(1 - value if value.dtype != torch.bool else ~value)


def of_gymnasium(env: Any) -> Iterator[Any]:
    """What an env or a vector env gives in an episode."""
    unwrapped = env.unwrapped
    space = getattr(unwrapped, "single_action_space", unwrapped.action_space)
    yield env.reset(seed=3)
    for action in moves(3, space):
        count = getattr(unwrapped, "num_envs", None)
        yield unwrapped.action_masks()
        heard = env.step(action if count is None else np.stack([action] * count))
        over = bool(torch.as_tensor(heard[2]).all())
        yield heard
        if over:
            yield unwrapped.action_masks()
            break


def of_pettingzoo(env: Any) -> Iterator[Any]:
    yield env.reset(seed=3)
    for action in rounds(3, env):
        yield env.state()
        yield env.step(dict(zip(env.possible_agents, action, strict=True)))
        if not env.agents:
            break


FACES: dict[str, Callable[[], Iterator[Any]]] = {
    **{
        f"{name}, env": lambda name=name: of_gymnasium(gym.make(f"tokenenv/{name}-v0", **small()))
        for name in IDS
    },
    **{
        f"{name}, vector env, {output}": lambda name=name, output=output: of_gymnasium(
            gym.make_vec(f"tokenenv/{name}-v0", num_envs=3, output=output, **small())
        )
        for name in IDS
        for output in ("numpy", "torch")
    },
    "TokenPrune, parallel": lambda: of_pettingzoo(token_prune_v0.parallel_env(**small())),
    "LayerPrune, parallel": lambda: of_pettingzoo(layer_prune_v0.parallel_env(**small())),
}


@pytest.mark.parametrize("face", FACES)
def test_writing_into_what_one_got_changes_nothing(face: str) -> None:
    played = list(map(copy.deepcopy, FACES[face]()))
    spoiled = []
    for heard in FACES[face]():
        spoiled.append(copy.deepcopy(heard))
        ruin(heard)
    assert same(spoiled, played)


def test_no_two_parts_of_an_info_are_one_array() -> None:
    envs = gym.make_vec("tokenenv/TokenPrune-v0", num_envs=3, **small())
    _, infos = envs.reset(seed=0)
    arrays = list(infos.values())
    shared = [
        (a, b)
        for a in range(len(arrays))
        for b in range(a)
        if np.shares_memory(arrays[a], arrays[b])
    ]
    assert not shared


def test_a_look_before_the_first_episode_is_one_clear_error() -> None:
    for ask in (
        token_prune_v0.parallel_env(**small()).state,
        layer_prune_v0.parallel_env(**small()).state,
        gym.make("tokenenv/LayerMerge-v0", **small()).unwrapped.action_masks,
        gym.make_vec("tokenenv/LayerMerge-v0", num_envs=2, **small()).action_masks,
    ):
        with pytest.raises(UserError, match=r"no episode was started: call reset\(\) first"):
            ask()


def test_a_reward_that_agents_share_reaches_each_of_them() -> None:
    env = token_prune_v0.parallel_env(reward=Dora(), **small())
    env.reset(seed=0)
    _, rewards, *_ = env.step(dict.fromkeys(env.agents, 1))
    assert len(rewards) == len(env.possible_agents) and len(set(rewards.values())) == 1


def test_a_reward_of_another_shape_is_named() -> None:
    def flat(turn: Turn) -> torch.Tensor:
        return torch.zeros(len(turn.after))

    envs = gym.make_vec("tokenenv/TokenPrune-v0", num_envs=2, reward=flat, **small())
    envs.reset(seed=0)
    with pytest.raises(UserError, match=r"flat has shape \(2,\): give \(2, 64\), or \(2, 1\)"):
        envs.step(np.ones((2, 64), dtype=np.int64))


def test_stable_baselines_gets_arrays_only() -> None:
    with pytest.raises(UserError, match="output='torch': stable-baselines3 takes arrays"):
        SB3VecEnv("tokenenv/LayerMerge-v0", output="torch")
