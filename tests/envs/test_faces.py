"""The token pruning game's faces: the ecosystem's own checkers, and that all show one game."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from helpers import DEPTH, PATCHES, backbone, choices, play_vector, same, small, source
from pettingzoo.test import (
    api_test,
    max_cycles_test,
    parallel_api_test,
    parallel_seed_test,
    render_test,
    seed_test,
)
from pettingzoo.test.state_test import state_test

import tokenenv
from tokenenv import UserError, token_prune_v0
from tokenenv.envs.token_prune_gym import TokenPruneEnv
from tokenenv.envs.token_prune_vector import TokenPruneVectorEnv
from tokenenv.game import render
from tokenenv.game.build import build_game
from tokenenv.game.rewards import AlphaBeta, Cooperative, KeepTarget, Turn

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ID = "tokenenv/TokenPrune-v0"
VARIANTS = pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"mask_in": "obs"},
        {"mask_in": None, "share": False},
        {"on_prune": "remove"},
        {"on_prune": "remove", "mask_in": "obs", "reward": "cooperative"},
        {"reward": "keep_target", "features": ("position", "agent_id"), "execution": "masked"},
        {"blocks": (0, 5), "features": ("token", "norm")},
    ],
    ids=lambda kwargs: "-".join(map(str, kwargs.values())) or "default",
)


def env(**kwargs: Any) -> Any:
    return token_prune_v0.env(**small(**kwargs))


def parallel_env(**kwargs: Any) -> Any:
    return token_prune_v0.parallel_env(**small(**kwargs))


# The ecosystem's checkers -------------------------------------------------------------------------
@VARIANTS
def test_pettingzoo_parallel(kwargs: dict[str, Any]) -> None:
    parallel_api_test(parallel_env(**kwargs), num_cycles=20)
    parallel_seed_test(lambda: parallel_env(**kwargs), num_cycles=6)


@VARIANTS
def test_pettingzoo_aec(kwargs: dict[str, Any]) -> None:
    api_test(env(**kwargs), num_cycles=4)
    seed_test(lambda: env(**kwargs), num_cycles=2)


def test_pettingzoo_max_cycles() -> None:
    max_cycles_test(SimpleNamespace(env=env, parallel_env=parallel_env))


def test_pettingzoo_state() -> None:
    state_test(env(), parallel_env())


def test_pettingzoo_render() -> None:
    render_test(env)


@pytest.mark.parametrize("kwargs", [{}, {"share": False, "execution": "masked"}])
def test_gymnasium(kwargs: dict[str, Any]) -> None:
    check_env(gym.make(ID, **small(**kwargs)).unwrapped)


def test_stable_baselines_check() -> None:
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    checker.check_env(gym.make(ID, **small()))


def test_stable_baselines_ppo() -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    model = sb3.PPO("MlpPolicy", gym.make(ID, **small()), n_steps=32, batch_size=32, n_epochs=1)
    model.learn(64)


def test_maskable_ppo() -> None:
    contrib = pytest.importorskip("sb3_contrib")
    game = gym.make(ID, **small())
    model = contrib.MaskablePPO("MlpPolicy", game, n_steps=32, batch_size=32, n_epochs=1)
    model.learn(64)
    seen, _ = game.reset(seed=0)
    for _ in range(2):
        action, _ = model.predict(seen, action_masks=game.unwrapped.action_masks())
        seen, _, _, _, info = game.step(action)
    assert info["illegal_actions"] == 0


def test_vector_env_follows_gymnasiums_same_step_form() -> None:
    kwargs = small(max_cycles=2)
    ours = gym.make_vec(ID, num_envs=2, **kwargs)
    mode = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
    theirs = gym.make_vec(ID, 2, vectorization_mode="sync", vector_kwargs=mode, **kwargs)
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    for one, other in zip(play_vector(ours, 0), play_vector(theirs, 0), strict=True):
        assert one[0].shape == other[0].shape and one[0].dtype == other[0].dtype
        if len(one) == 5:
            assert one[2].tolist() == other[2].tolist() and one[3].tolist() == other[3].tolist()
        extra = _outline(one[-1]).keys() - _outline(other[-1]).keys()
        assert extra in (set(), {"final_info.episode", "final_info._episode"} | EPISODE)
        assert _outline(other[-1]).items() <= _outline(one[-1]).items()


EPISODE = {f"final_info.episode.{key}" for key in ("r", "_r", "l", "_l")}


def _outline(infos: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Names, types and shapes of nested infos."""
    outline: dict[str, Any] = {}
    for key, value in infos.items():
        if isinstance(value, dict):
            outline |= {f"{path}{key}": dict} | _outline(value, f"{path}{key}.")
        else:
            outline[f"{path}{key}"] = (value.dtype, value.shape)
    return outline


# One game on all faces ----------------------------------------------------------------------------
@pytest.mark.parametrize("reward", ["alpha_beta", "keep_target", "cooperative"])
@pytest.mark.parametrize("seed", range(3))
def test_all_faces_show_the_same_game(reward: str, seed: int) -> None:
    kwargs = small(reward=reward)
    game = build_game(**kwargs)
    game.seed(seed)
    seen = game.reset()
    single, parallel = TokenPruneEnv(**kwargs), token_prune_v0.parallel_env(**kwargs)
    vector, turns = TokenPruneVectorEnv(1, **kwargs), token_prune_v0.env(**kwargs)
    rows = single.reset(seed=seed)[0]
    agents = parallel.reset(seed=seed)[0]
    batch = vector.reset(seed=seed)[0]
    turns.reset(seed=seed)
    for action in choices(seed):
        assert seen is not None
        own = seen.agents[0].numpy()
        assert same(rows, batch[0]) and same(rows, np.stack(list(agents.values())))
        assert same(rows, np.stack([turns.observe(agent) for agent in turns.agents]))
        assert same(rows[:, : game.agent_dim], own)
        living = seen.active[0].numpy()
        assert (rows[living, game.agent_dim :] == seen.shared[0].numpy()).all()
        assert not rows[~living].any()
        assert same(parallel.state(), seen.state[0].numpy())

        native = game.step(torch.from_numpy(action)[None])
        seen = native.observation
        rows, scalar, over, _, info = single.step(action)
        agents, shares, _, _, infos = parallel.step(dict(zip(agents, action, strict=True)))
        batch, totals, _, _, many = vector.step(action[None])
        for choice in action:
            turns.step(choice)
        assert list(shares.values()) == native.reward[0].tolist()
        assert shares == {agent: turns.rewards[agent] for agent in shares}
        assert scalar == float(totals[0]) == pytest.approx(sum(shares.values()), rel=1e-5)
        if over:
            break
    assert native.outcome is not None
    assert info["correct"] == bool(native.outcome.correct[0]) == infos["token_0"]["correct"]
    assert info["correct"] == many["final_info"]["correct"][0]
    assert info["tokens_left"] == many["final_info"]["tokens_left"][0]
    assert many["final_info"]["episode"]["l"].tolist() == [game.steps]


def test_rows_of_the_vector_env_are_the_batched_game() -> None:
    count, seed = 5, 3
    kwargs = small(reward="cooperative")
    envs = TokenPruneVectorEnv(count, **kwargs)
    game = build_game(batch_size=count, **kwargs)
    game.seed(seed)
    seen, (batch, _) = game.reset(), envs.reset(seed=seed)
    single = TokenPruneEnv(**kwargs)
    row, _ = single.reset(seed=seed)
    total = 0.0
    for action in choices(seed):
        assert same(batch[:, :, : game.agent_dim], seen.agents.numpy())
        np.testing.assert_allclose(batch[0], row, atol=1e-4)
        native = game.step(torch.from_numpy(action).expand(count, -1))
        batch, rewards, over, _, infos = envs.step(np.stack([action] * count))
        row, reward, _, _, _ = single.step(action)
        total += reward
        np.testing.assert_array_equal(rewards, native.reward.sum(1).numpy())
        assert rewards[0] == pytest.approx(reward, rel=1e-4)
        if over.all():
            break
        seen = native.observation
    assert infos["final_info"]["episode"]["r"][0] == pytest.approx(total, rel=1e-4)
    assert all(not final.any() for final in infos["final_obs"])
    assert batch.any()  # the next images


def test_torch_output_is_the_numpy_output() -> None:
    arrays = play_vector(TokenPruneVectorEnv(3, **small()), 0)
    tensors = play_vector(TokenPruneVectorEnv(3, output="torch", **small()), 0)

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(plain, value))
        return np.stack(list(value)) if isinstance(value, np.ndarray) else value.numpy()

    assert same(plain(arrays), plain(tensors))


def test_torch_output_can_be_learned_from() -> None:
    envs = TokenPruneVectorEnv(2, output="torch", **small())
    seen, _ = envs.reset(seed=0)
    network = torch.nn.Linear(seen.shape[-1], 1)
    _, rewards, _, _, infos = envs.step(torch.ones(2, PATCHES, dtype=torch.int64))
    (network(seen)[..., 0].sum(1) * rewards * infos["tokens_left"]).sum().backward()
    assert network.weight.grad is not None


# Pruned agents that leave -------------------------------------------------------------------------
def test_pruned_agents_leave_with_their_last_reward() -> None:
    stays, leaves = parallel_env(), parallel_env(on_prune="remove")
    assert same(stays.reset(seed=0), leaves.reset(seed=0))
    for action in choices(0):
        before = list(leaves.agents)
        actions = dict(zip(stays.possible_agents, action, strict=True))
        _, expected, _, _, _ = stays.step(actions)
        seen, rewards, terminations, truncations, infos = leaves.step(actions)
        assert list(seen) == list(rewards) == list(terminations) == list(infos) == before
        assert rewards == {agent: expected[agent] for agent in before}
        assert not any(truncations.values())
        if not stays.agents:
            break
        pruned = [agent for agent in before if not actions[agent]]
        assert [agent for agent in before if terminations[agent]] == pruned
        assert all(not seen[agent].any() for agent in pruned)
        assert leaves.agents == [agent for agent in before if actions[agent]]
    assert all(terminations.values()) and leaves.agents == []


def test_when_all_leave_the_episode_is_over() -> None:
    leaves = parallel_env(on_prune="remove")
    leaves.reset(seed=0)
    _, _, terminations, _, _ = leaves.step(dict.fromkeys(leaves.agents, 0))
    assert all(terminations.values()) and leaves.agents == []
    assert leaves.step({}) == ({}, {}, {}, {}, {})
    leaves.reset()
    assert len(leaves.agents) == PATCHES


# Building -----------------------------------------------------------------------------------------
def test_importing_the_package_loads_no_model_library() -> None:
    code = (
        "import sys, gymnasium, pettingzoo, tokenenv; "
        "print([m for m in ('torch', 'torchvision', 'timm', 'sklearn') if m in sys.modules]); "
        f"assert '{ID}' in gymnasium.registry; dir(tokenenv)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_exists() -> None:
    for name in tokenenv.__all__:
        assert getattr(tokenenv, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tokenenv.nothing


def test_make_imports_the_package_by_itself() -> None:
    code = (
        "import gymnasium as gym; "
        f"env = gym.make('tokenenv:{ID}', max_cycles=1); env.reset(seed=0); "
        "print(env.step(env.action_space.sample())[2])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_defaults_follow_the_model() -> None:
    reward = build_game(**small()).reward
    assert isinstance(reward, AlphaBeta)
    assert (reward.alpha, reward.beta) == (pytest.approx(24 * PATCHES / 196), 0.1)
    reward = build_game(**small(reward="keep_target", max_cycles=4, features=["norm"])).reward
    assert isinstance(reward, KeepTarget)
    assert reward.targets == pytest.approx((0.7, 0.49, 0.343, 0.2401))
    reward = build_game(**small(reward="cooperative", reward_kwargs={"beta": 0.5})).reward
    assert reward == Cooperative(beta=0.5)


def test_a_reward_of_ones_own() -> None:
    def survivors(turn: Turn) -> torch.Tensor:
        return turn.after.float()

    game = TokenPruneEnv(**small(reward=survivors))
    game.reset(seed=0)
    action = next(choices(0))
    assert game.step(action)[1] == action.sum()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_cycles": DEPTH}, f"max_cycles={DEPTH} .* choose 1 to {DEPTH - 1}"),
        ({"max_cycles": 0}, "max_cycles=0"),
        ({"max_cycles": 2, "blocks": (1, 2, 3)}, "max_cycles=2 but 3 decision blocks"),
        ({"blocks": (1, 99)}, "decision block 99 is out of range"),
        ({"features": ("colour",)}, "unknown feature 'colour'"),
        ({"reward": "money"}, "unknown reward 'money'"),
        ({"reward_kwargs": {"gamma": 1}}, "no parameter 'gamma': choose from alpha, beta"),
        ({"reward": AlphaBeta(), "reward_kwargs": {"beta": 1}}, "give them to AlphaBeta"),
        ({"weights": "w.pth"}, "weights 'w.pth' go with a model's name"),
        ({"execution": "nested"}, "execution='nested'"),
        ({"render_mode": "video"}, "render_mode='video': choose from None, human"),
        ({"on_prune": "kill"}, "on_prune='kill': choose from mask, remove"),
        ({"mask_in": "state"}, "mask_in='state'"),
    ],
)
def test_mistakes_at_creation(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parallel_env(**kwargs).reset()
    assert "\n" not in str(caught.value)


def test_mistakes_in_play() -> None:
    agents, single = parallel_env(), TokenPruneEnv(**small())
    with pytest.raises(UserError, match=r"call reset\(\) first"):
        agents.step({})
    with pytest.raises(UserError, match="seed -1 is negative"):
        agents.reset(seed=-1)
    agents.reset(seed=0)
    single.reset(seed=0)
    with pytest.raises(UserError, match="no action for 'token_1'"):
        agents.step({"token_0": 1})
    with pytest.raises(UserError, match="action 2 is neither 0"):
        agents.step(dict.fromkeys(agents.agents, 2))
    with pytest.raises(UserError, match=r"action has shape \(1, 3\): give one of shape \(1, 64\)"):
        single.step(np.ones(3, int))
    with pytest.raises(UserError, match="render_mode is None"):
        single.render()
    with pytest.raises(UserError, match="give max_cycles=2 instead"):
        gym.make_vec(ID, max_episode_steps=2, **small())
    with pytest.raises(UserError, match="output='jax'"):
        TokenPruneVectorEnv(**small(output="jax"))


def test_human_mode_prints_each_step(capsys: pytest.CaptureFixture[str]) -> None:
    game = TokenPruneEnv(render_mode="human", **small(max_cycles=1))
    game.reset(seed=0)
    game.step(next(choices(0)))
    assert capsys.readouterr().out.count("image") == 2


def test_vector_env_renders_every_image() -> None:
    envs = gym.make_vec(ID, num_envs=3, render_mode="rgb_array", **small())
    envs.reset(seed=0)
    frames = envs.render()
    assert len(frames) == 3 and frames[0].dtype == np.uint8


def test_pixels_are_the_sources() -> None:
    batch = source().batch(torch.tensor([4]))
    pixels = render.to_pixels(batch.images[0], backbone().model)
    stored = source()._store.read([source()._positions[4]])[0]
    assert pixels.shape == (8, 8, 3) and (pixels[..., 0] == stored[0].numpy()).all()


def test_pruned_tokens_are_greyed_where_they_are() -> None:
    pixels = np.zeros((10, 15, 3), np.uint8)
    alive = np.ones((2, 3), bool)
    alive[1, 2] = False
    grey = render.greyed(pixels, alive.reshape(-1), (2, 3)).any(axis=2)
    expected = np.zeros((10, 15), bool)
    expected[5:, 10:] = True
    assert (grey == expected).all()
