"""A small game that every face can be made of, and ways to play one to its end."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import timm
import torch
from gymnasium import spaces

import tokenenv.vit.digits  # noqa: F401  (registers digits_vit)
from tokenenv.data import ImageSource, open_source
from tokenenv.game.cost import measured_macs
from tokenenv.vit import attention
from tokenenv.vit.backbone import Backbone

FOLDERS = ("support", "agents", "data", "game", "vit")
"""Of tests that others import from; as pytest's ``pythonpath``."""

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"
)

PATCHES = 64
DEPTH = 6


@cache
def backbone() -> Backbone:
    """digits_vit with fewer blocks, untrained: what faces do doesn't depend on the weights."""
    # Whoever asks first may be in inference mode; others learn with these weights.
    with torch.random.fork_rng(), torch.inference_mode(False):
        torch.manual_seed(0)
        return Backbone(timm.create_model("digits_vit", depth=DEPTH))


@cache
def source() -> ImageSource:
    return open_source("digits", backbone().model, split="train", limit=100)


def small(**kwargs: Any) -> dict[str, Any]:
    """Arguments of any face for a game that starts and runs fast."""
    return {"model": backbone(), "data": source()} | kwargs


def executed_macs(run: Callable[[], Any]) -> float:
    """Multiply-adds that ``run()`` executes: torch counts products of matrices, the rest is here.

    The class token's row of attention is a sum of products, with one for each number of the keys.
    """
    with mock.patch.object(attention, "first_scores", wraps=attention.first_scores) as rows:
        counted = measured_macs(run)
    return counted + sum(call.args[1].numel() for call in rows.call_args_list)


def choices(
    seed: int, keep: float = 0.7, agents: int = PATCHES, actions: int = 2
) -> Iterator[np.ndarray]:
    """``(agents,)`` actions without end, the same for a seed; of many only the first four."""
    rng = np.random.default_rng(seed)
    while True:
        if actions == 2:
            yield (rng.random(agents) < keep).astype(np.int64)
        else:
            yield rng.integers(0, min(actions, 4), agents)


def moves(seed: int, space: spaces.Space[Any]) -> Iterator[Any]:
    """Actions of a Gymnasium action space without end, the same for a seed."""
    if isinstance(space, spaces.Discrete):
        return (action[0] for action in choices(seed, agents=1, actions=int(space.n)))
    assert isinstance(space, spaces.MultiDiscrete)
    return choices(seed, agents=len(space.nvec))


def rounds(seed: int, env: Any) -> Iterator[np.ndarray]:
    """Actions of all possible agents without end, the same for a seed."""
    count = env.action_space(env.possible_agents[0]).n
    return choices(seed, agents=len(env.possible_agents), actions=int(count))


def play_parallel(env: Any, seed: int, episodes: int = 2) -> list[Any]:
    """All that a parallel env gives back in some episodes."""
    heard: list[Any] = []
    for episode in range(episodes):
        heard.append(env.reset(seed=seed if episode == 0 else None))
        heard.append(env.state())
        for action in rounds(seed + episode, env):
            heard.append(env.step(dict(zip(env.possible_agents, action, strict=True))))
            heard.append(env.state())
            if not env.agents:
                break
    return heard


def play_aec(env: Any, seed: int, episodes: int = 2) -> list[Any]:
    """All that the agents of an AEC env hear, in order."""
    heard: list[Any] = []
    for episode in range(episodes):
        env.reset(seed=seed if episode == 0 else None)
        stream = rounds(seed + episode, env)
        index = {agent: i for i, agent in enumerate(env.possible_agents)}
        action, acted = next(stream), set[str]()
        for agent in env.agent_iter():
            if agent in acted:
                action, acted = next(stream), set()
            acted.add(agent)
            heard.append((agent, env.last()))
            over = env.terminations[agent] or env.truncations[agent]
            env.step(None if over else action[index[agent]])
    return heard


def play_env(env: Any, seed: int, episodes: int = 2) -> list[Any]:
    """All that a Gymnasium env gives back in some episodes."""
    heard: list[Any] = []
    for episode in range(episodes):
        heard.append(env.reset(seed=seed if episode == 0 else None))
        for action in moves(seed + episode, env.action_space):
            heard.append(env.step(action))
            if heard[-1][2] or heard[-1][3]:
                break
    return heard


def play_vector(envs: Any, seed: int, episodes: int = 2) -> list[Any]:
    """All that a vector env gives back in some episodes; every image gets the same actions."""
    heard: list[Any] = [envs.reset(seed=seed)]
    for episode in range(episodes):
        for action in moves(seed + episode, envs.single_action_space):
            heard.append(envs.step(np.stack([action] * envs.num_envs)))
            if heard[-1][2].any():
                break
    return heard


PLAYS: dict[str, Callable[..., list[Any]]] = {
    "env": play_env,
    "vector_env": play_vector,
    "parallel": play_parallel,
    "aec": play_aec,
}
"""How to play each kind of face."""


def same(one: Any, other: Any) -> bool:
    """Whether two nested records are equal, arrays in type, shape and every value."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray) and one.dtype == object:
        return same(list(one), list(other))
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return bool(one == other)


def start(script: str, *words: str, count: int = 2, **options: Any) -> list[subprocess.Popen[str]]:
    """Start ``count`` processes that find each other as under ``torchrun``, with ``words``."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    root = Path(__file__).resolve().parents[2]
    shared = {
        "MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(count),
        "PYTHONPATH": os.pathsep.join(map(str, (root, *(root / "tests" / f for f in FOLDERS)))),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", script, *words]
    return [
        subprocess.Popen(
            command, env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
        )
        for rank in range(count)
    ]  # fmt: skip
