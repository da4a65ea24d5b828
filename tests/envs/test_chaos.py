"""Random episodes with random options and every mistake a caller can make, on every face.

Only the documented exceptions come, illegal actions are counted, and the next seeded episodes are
those of a fresh environment. ``pytest -m slow tests/envs/test_chaos.py`` plays 10,000 episodes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import gymnasium
import numpy as np
import pytest
import timm
import torch
from gymnasium.envs.registration import load_env_creator
from helpers import PLAYS, same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tokenenv.vit.digits  # noqa: F401  (registers digits_vit)
from tokenenv.data import ImageSource, open_source
from tokenenv.envs.ids import IDS, EnvId
from tokenenv.errors import UserError
from tokenenv.vit.backbone import Backbone

pytestmark = pytest.mark.filterwarnings("ignore")

# Not a whole number, out of range, or of another shape.
BAD: tuple[Any, ...] = (
    float("nan"), float("inf"), -1, 10**6, 10**30, 0.5, "keep", None, [[[1]]], {}, object(), 1j,
    np.uint64(99), np.nan, torch.tensor(float("nan")), torch.ones(1, 2, 1),
)  # fmt: skip

# What PettingZoo's wrapper raises. Before 1.4 Gymnasium's Discrete can't compare 10**30.
OLD = tuple(int(part) for part in gymnasium.__version__.split(".")[:2]) < (1, 4)
OUT_OF_BOUNDS = (AssertionError, OverflowError) if OLD else (AssertionError,)


@cache
def backbone() -> Backbone:
    """A ViT of 16 tokens that takes a millisecond."""
    with torch.random.fork_rng(), torch.inference_mode(False):
        torch.manual_seed(0)
        shape = {"img_size": 4, "depth": 3, "embed_dim": 24}
        return Backbone(timm.create_model("digits_vit", **shape))


@cache
def source() -> ImageSource:
    return open_source("digits", backbone().model, split="train", limit=20)


@st.composite
def games(draw: st.DrawFn) -> tuple[EnvId, str, dict[str, Any]]:
    """An id, a face and options that go together."""
    entry = draw(st.sampled_from(IDS))
    face = draw(st.sampled_from([face for face in PLAYS if getattr(entry, face)]))
    options: dict[str, Any] = {}
    options["execution"] = draw(st.sampled_from(["masked", "padded", "packed"]))
    blocks = st.sets(st.integers(1, 2), min_size=1).map(lambda chosen: tuple(sorted(chosen)))
    options["blocks"] = draw(blocks)
    tokens = entry.id == IDS[0].id
    if tokens:
        reward = draw(st.sampled_from(["alpha_beta", "keep_target", "cooperative"]))
        kwargs: dict[str, Any] = {"cooperative": {"shared": draw(st.booleans())}}.get(reward, {})
        names = ["token", "position", "progress", "cls_attention", "redundancy", "similarity"]
        features = st.lists(st.sampled_from([*names, "norm", "agent_id"]), min_size=1, unique=True)
        options |= {"features": tuple(draw(features)), "share": draw(st.booleans())}
    else:
        reward, damage = "dora", draw(st.sampled_from(["drift", "divergence"]))
        kwargs = {"damage": damage, "terminal": draw(st.booleans())}
        merges = "Merge" in entry.id
        options["grid" if merges else "budget_step"] = (0, 1, 2, 5) if merges else 3
        if face in ("env", "vector_env"):
            options["action"] = draw(st.sampled_from(["count", "pairs" if merges else "tokens"]))
    options |= {"reward": reward, "reward_kwargs": kwargs}
    if face == "vector_env":
        options["repeats"] = draw(st.integers(1, 2))
        options["num_envs"] = options["repeats"] * draw(st.integers(1, 3))
        options["output"] = draw(st.sampled_from(["numpy", "torch"]))
    if face in ("parallel", "aec"):
        options["mask_in"] = draw(st.sampled_from(["info", "obs", None]))
        if tokens:
            options["on_prune"] = draw(st.sampled_from(["mask", "remove"]))
    return entry, face, options


PLAYED = {"episodes": 0}
EPISODES = 3


def wrong(rng: np.random.Generator, action: Any) -> Any:
    """``action`` with something in it that is none."""
    if rng.random() < 0.5:
        return BAD[rng.integers(len(BAD))]
    action = np.array(action, np.float64)
    action.flat[-1] = rng.choice([np.nan, np.inf, -1, 7e9, 0.25])
    return action


def play_joint(env: Any, rng: np.random.Generator, many: bool) -> None:
    """Faces that take one array."""
    space, game = env.action_space, env.game
    with pytest.raises(UserError):  # before the first episode
        env.step(space.sample())
    for _ in range(EPISODES):
        env.reset()
        PLAYED["episodes"] += 1
        counted, over = np.zeros(env.num_envs if many else 1, np.int64), False
        while not over:
            masks = np.asarray(env.action_masks()).reshape(len(counted), game.agents, game.actions)
            shape = masks.shape[:2]
            action = rng.integers(0, game.actions, shape)
            legal = np.take_along_axis(masks, action[..., None], 2)[..., 0]
            given = action.reshape(space.shape)
            mistake = rng.random()
            if mistake < 0.1:
                with pytest.raises(UserError):
                    env.step(wrong(rng, given))
            if mistake > 0.97:
                break  # a reset in the middle
            form = rng.choice([np.int64, np.uint8, np.uint64, np.float32, np.int8])
            heard = env.step(torch.as_tensor(given) if mistake > 0.8 else form(given))
            counted += (~legal).sum(1)
            over = bool(np.asarray(heard[2]).any())
            info = heard[4]["final_info"] if over and many else heard[4]
            assert np.array_equal(np.ravel(info["illegal_actions"]), counted)
        if over and not many:
            with pytest.raises(UserError, match=r"call reset\(\) first"):
                env.step(given)


def play_parallel(env: Any, rng: np.random.Generator) -> None:
    """PettingZoo's parallel form."""
    with pytest.raises(UserError):
        env.step({})
    for _ in range(EPISODES):
        _, infos = env.reset()
        PLAYED["episodes"] += 1
        counted: dict[str, int] = dict.fromkeys(env.agents, 0)
        while env.agents:
            acts = {agent: infos[agent]["active_mask"] for agent in env.agents}
            count = int(env.action_space(env.agents[0]).n)
            actions: dict[str, Any] = {a: int(rng.integers(count)) for a in env.agents}
            for agent, choice in actions.items():
                if env.mask_in == "info":
                    counted[agent] += int(not infos[agent]["action_mask"][choice])
            mistake, living = rng.random(), [agent for agent in env.agents if acts[agent]]
            if mistake < 0.15 and living:
                victim = living[rng.integers(len(living))]
                bad = BAD[rng.integers(len(BAD))]
                with pytest.raises(UserError):
                    env.step(actions | {victim: bad})
                with pytest.raises(UserError):
                    env.step({a: c for a, c in actions.items() if a != victim})
            if mistake > 0.97:
                break
            if mistake > 0.6:  # strangers, and types that are whole numbers too
                kind = [np.int64, np.uint8, np.asarray, np.int32][rng.integers(4)]
                actions = {a: kind(c) for a, c in actions.items()} | {"nobody": "nothing"}
                actions |= {agent: bool(c) for agent, c in actions.items() if count == 2}
                actions["nobody"] = "nothing"
            _, rewards, _, _, infos = env.step(actions)
            assert np.isfinite(list(rewards.values())).all()
            if env.mask_in == "info":
                assert all(infos[a]["illegal_actions"] == counted[a] for a in infos)
        else:
            assert env.step({"token_0": float("nan")}) == ({}, {}, {}, {}, {})


def play_aec(env: Any, rng: np.random.Generator) -> None:
    """PettingZoo's form of turns; a wrapper of its own asserts that actions are in their space."""
    for _ in range(EPISODES):
        env.reset()
        PLAYED["episodes"] += 1
        for agent in env.agent_iter():
            over = env.terminations[agent]
            mistake = rng.random()
            if mistake < 0.02:
                wanted = ValueError if over else UserError
                with pytest.raises((wanted, *OUT_OF_BOUNDS)):
                    env.step(0 if over else BAD[rng.integers(len(BAD))])
            if mistake > 0.998 or (over and mistake < 0.02):
                break
            env.step(None if over else int(rng.integers(env.action_space(agent).n)))
        else:
            env.step(0)  # warned about by PettingZoo, and ignored


def chaos(game: tuple[EnvId, str, dict[str, Any]], seed: int) -> None:
    entry, face, options = game
    options = {"model": backbone(), "data": source()} | options
    make = load_env_creator(getattr(entry, face))
    env, rng = make(**options), np.random.default_rng(seed)
    if face == "parallel":
        play_parallel(env, rng)
    elif face == "aec":
        play_aec(env, rng)
    else:
        play_joint(env, rng, many=face == "vector_env")
    assert same(PLAYS[face](env, seed, 1), PLAYS[face](make(**options), seed, 1))
    PLAYED["episodes"] += 2
    env.close()
    env.close()


ODD = [HealthCheck.too_slow, HealthCheck.data_too_large]
SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=50, deadline=None, suppress_health_check=ODD, derandomize=True)
@given(games(), SEEDS)
def test_no_mistake_corrupts_an_episode(game: tuple[EnvId, str, dict[str, Any]], seed: int) -> None:
    chaos(game, seed)


@pytest.mark.slow
def test_ten_thousand_episodes() -> None:
    @settings(max_examples=2000, deadline=None, suppress_health_check=ODD, database=None)
    @given(games(), SEEDS)
    def play(game: tuple[EnvId, str, dict[str, Any]], seed: int) -> None:
        chaos(game, seed)

    PLAYED["episodes"] = 0
    play()
    assert PLAYED["episodes"] >= 10_000
