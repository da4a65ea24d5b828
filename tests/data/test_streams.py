"""Random streams: a seed decides whole episodes on every face, whatever else goes on."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.envs.registration import load_env_creator
from helpers import PLAYS, moves, same, small

from tokenenv.envs.ids import IDS
from tokenenv.envs.token_prune_vector import TokenPruneVectorEnv

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

Play = Callable[..., list[Any]]


def play_sb3(env: Any, seed: int, episodes: int = 2) -> list[Any]:
    env.seed(seed)
    heard: list[Any] = [env.reset()]
    for episode in range(episodes):
        for action in moves(seed + episode, env.action_space):
            heard.append(env.step(np.stack([action] * env.num_envs)))
            if heard[-1][2].any():
                break
    return heard


def play_torchrl(env: Any, seed: int, episodes: int = 2) -> list[Any]:
    env.set_seed(seed)
    data, heard = env.reset(), []
    generator = torch.Generator().manual_seed(seed)
    for _ in range(episodes * env.game.steps):
        masks = data["agents", "action_mask"].float()
        action = torch.multinomial(masks.flatten(0, 1), 1, generator=generator)
        data["agents", "action"] = action.reshape(masks.shape[:2])
        step, data = env.step_and_maybe_reset(data)
        heard.append(dict(step.clone().flatten_keys(".").items()))
    return heard


def sb3(id: str, **kwargs: Any) -> Any:
    pytest.importorskip("stable_baselines3")
    from tokenenv.envs.sb3 import SB3VecEnv

    return SB3VecEnv(id, 3, **small(**kwargs))


def torchrl(id: str, **kwargs: Any) -> Any:
    pytest.importorskip("torchrl", reason="TorchRL is not installed: pip install '.[torchrl]'")
    from tokenenv.envs.torchrl import TorchRLEnv

    return TorchRLEnv(id, 3, **small(**kwargs))


def faces() -> list[Any]:
    made = []
    for entry in IDS:
        for face, play in PLAYS.items():
            if not getattr(entry, face):
                continue
            creator = getattr(entry, face)
            for output in ("numpy", "torch") if face == "vector_env" else (None,):
                extra = {"output": output, "num_envs": 3} if output else {}

                def make(creator: str = creator, extra: Any = extra) -> Any:
                    return load_env_creator(creator)(**small(**extra))

                made.append(pytest.param(make, play, id=f"{entry.id}-{face}-{output or ''}"))
        for name, maker, play in (("sb3", sb3, play_sb3), ("torchrl", torchrl, play_torchrl)):
            make = lambda maker=maker, id=entry.id: maker(id)  # noqa: E731
            made.append(pytest.param(make, play, id=f"{entry.id}-{name}"))
    return made


def disturbed(env: Any) -> Any:
    """``env``, with another one playing and global generators seeded anew at each step of it."""
    noise, step, drawn = TokenPruneVectorEnv(2, **small()), env.step, np.random.default_rng()
    noise.reset()

    def louder(*args: Any) -> Any:
        np.random.seed(int(drawn.integers(2**31)))
        torch.manual_seed(int(drawn.integers(2**31)))
        noise.step(torch.randint(2, (2, noise.game.agents)))
        return step(*args)

    env.step = louder
    return env


@pytest.mark.parametrize(("make", "play"), faces())
def test_a_seed_decides_whole_episodes(make: Callable[[], Any], play: Play) -> None:
    """Bit for bit: three episodes, the first after a seed and the others after none."""
    first = play(make(), 5, episodes=3)
    used = make()
    play(used, 9, episodes=1)
    used.reset()
    assert same(play(disturbed(used), 5, episodes=3), first)
    assert not same(play(make(), 6, episodes=3), first)


@pytest.mark.parametrize("entry", [e for e in IDS if e.parallel], ids=lambda e: e.id)
def test_action_spaces_draw_from_their_own_seed(entry: Any) -> None:
    def drawn(seed: int) -> list[list[int]]:
        env = load_env_creator(entry.parallel)(**small())
        env.reset(seed=0)
        spaces = [env.action_space(agent) for agent in env.possible_agents[:3]]
        for i, space in enumerate(spaces):
            space.seed(seed + i)
        env.reset(seed=1)  # leaves them alone
        return [[int(space.sample()) for _ in range(20)] for space in spaces]

    assert drawn(3) == drawn(3)
    assert drawn(3)[0] != drawn(3)[1] == drawn(4)[0]


FORKED = """
import multiprocessing, sys, torch
import gymnasium as gym
import tokenenv
torch.set_num_threads(2)
env = gym.make("tokenenv/LayerMerge-v0", max_cycles=1).unwrapped
envs = gym.make_vec("tokenenv/LayerMerge-v0", num_envs=64, max_cycles=1)
for _ in range(3):
    envs.reset(seed=0), envs.step([1] * 64)  # starts torch's threads
def play(pipe):
    inherited = env.reset(seed=1)[0]
    fresh = gym.make("tokenenv/LayerMerge-v0", max_cycles=1).unwrapped.reset(seed=1)[0]
    envs.reset(seed=0), envs.step([1] * 64)
    pipe.send((torch.get_num_threads(), bool((inherited == fresh).all())))
here, there = multiprocessing.Pipe()
child = multiprocessing.get_context("fork").Process(target=play, args=(there,))
child.start()
print(here.recv() if here.poll(float(sys.argv[1])) else "hangs", torch.get_num_threads())
child.kill()
"""


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="the system does not fork"
)
def test_a_forked_worker_does_not_wait_for_its_parents_threads() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED, "60"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "(1, True) 2", done.stderr[-2000:]
