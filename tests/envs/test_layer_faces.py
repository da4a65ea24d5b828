"""The faces of the games of one agent per block: the ecosystem's checkers, and one game on all."""

from __future__ import annotations

import pickle
from types import ModuleType, SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from helpers import DEPTH, PATCHES, moves, play_env, play_vector, rounds, same, small
from pettingzoo.test import (
    api_test,
    max_cycles_test,
    parallel_api_test,
    parallel_seed_test,
    render_test,
    seed_test,
)
from pettingzoo.test.state_test import state_test
from pettingzoo.utils.conversions import parallel_to_aec

from tokenenv import UserError, build_game, layer_merge_v0, layer_prune_v0
from tokenenv.game import render

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

MERGE, PRUNE, TOKENS = "tokenenv/LayerMerge-v0", "tokenenv/LayerPrune-v0", "tokenenv/TokenPrune-v0"
MODULE = pytest.mark.parametrize("module", [layer_merge_v0, layer_prune_v0])
GAME = pytest.mark.parametrize(
    ("name", "action"),
    [(MERGE, "count"), (MERGE, "pairs"), (PRUNE, "count"), (PRUNE, "tokens")],
)
RULES = {MERGE: "layer_merge", PRUNE: "layer_prune"}
SLOTS = {"count": 1, "pairs": PATCHES // 2, "tokens": PATCHES}


def make(name: str, **kwargs: Any) -> Any:
    return gym.make(name, **small(**kwargs))


def make_vec(name: str, num_envs: int, **kwargs: Any) -> Any:
    return gym.make_vec(name, num_envs, vectorization_mode="vector_entry_point", **small(**kwargs))


# The ecosystem's checkers -------------------------------------------------------------------------
@MODULE
@pytest.mark.parametrize("mask_in", ["info", "obs", None])
def test_pettingzoo(module: ModuleType, mask_in: str | None) -> None:
    kwargs = small(mask_in=mask_in)
    parallel_api_test(module.parallel_env(**kwargs), num_cycles=20)
    parallel_seed_test(lambda: module.parallel_env(**kwargs), num_cycles=8)
    api_test(module.env(**kwargs), num_cycles=4)
    seed_test(lambda: module.env(**kwargs), num_cycles=2)
    state_test(module.env(**kwargs), module.parallel_env(**kwargs))


@MODULE
def test_pettingzoo_cycles_and_pictures(module: ModuleType) -> None:
    def parallel_env(**kwargs: Any) -> Any:
        return module.parallel_env(**small(**kwargs))

    # In the native AEC env every agent acts once: it has no cycles to count.
    aec = SimpleNamespace(
        env=lambda **kwargs: parallel_to_aec(parallel_env(**kwargs)), parallel_env=parallel_env
    )
    max_cycles_test(aec)
    render_test(lambda **kwargs: module.env(**small(max_cycles=3, **kwargs)))


@MODULE
def test_is_parallelizable_is_honest(module: ModuleType) -> None:
    assert module.parallel_env(**small()).metadata["is_parallelizable"]
    assert not module.env(**small()).metadata["is_parallelizable"]
    name = module.__name__.rpartition(".")[2]
    assert module.raw_env(**small()).metadata["name"] == name


@GAME
def test_gymnasium_and_stable_baselines_checkers(name: str, action: str) -> None:
    check_env(make(name, action=action).unwrapped)
    pytest.importorskip("stable_baselines3.common.env_checker").check_env(make(name, action=action))


@GAME
def test_learners_need_no_glue(name: str, action: str) -> None:
    sb3, contrib = pytest.importorskip("stable_baselines3"), pytest.importorskip("sb3_contrib")
    game = make(name, action=action, max_cycles=3)
    settings: dict[str, Any] = {"n_steps": 12, "batch_size": 12, "n_epochs": 1, "device": "cpu"}
    sb3.PPO("MlpPolicy", game, **settings).learn(24)
    model = contrib.MaskablePPO("MlpPolicy", game, **settings).learn(24)
    seen, _ = game.reset(seed=0)
    for _ in range(3):
        choice, _ = model.predict(seen, action_masks=game.unwrapped.action_masks())
        seen, _, _, _, info = game.step(choice)
    assert info["illegal_actions"] == 0


# Spaces and masks ---------------------------------------------------------------------------------
@GAME
def test_spaces(name: str, action: str) -> None:
    env = make(name, action=action)
    game = env.unwrapped.game
    width = game.agent_dim + game.shared_dim
    assert env.unwrapped.max_cycles == DEPTH
    if action == "count":
        assert env.action_space == gym.spaces.Discrete(game.actions)
        assert env.observation_space.shape == (width,)
    else:
        assert env.action_space == gym.spaces.MultiDiscrete([2] * SLOTS[action])
        assert env.observation_space.shape == (SLOTS[action], width)
    _, info = env.reset(seed=0)
    assert info["tokens_left"] == PATCHES and ("active_mask" in info) == (action != "count")
    masks = env.unwrapped.action_masks()
    assert masks.shape == (SLOTS[action] * game.actions,) and masks.all()


def test_a_count_is_the_default() -> None:
    for name in RULES:
        assert isinstance(make(name).action_space, gym.spaces.Discrete)


@GAME
def test_illegal_actions_are_counted_and_change_nothing(name: str, action: str) -> None:
    good, bad = make(name, action=action).unwrapped, make(name, action=action).unwrapped
    first = {"count": -1, "pairs": np.ones(32, int), "tokens": (np.arange(64) < 4).astype(int)}
    for env in (good, bad):
        env.reset(seed=0)
        most = env.action_space.n - 1 if action == "count" else first[action]
        env.step(most)
    masks = bad.action_masks().reshape(SLOTS[action], -1)
    forbidden = ~masks[:, -1]
    assert masks[:, 0].all() and forbidden.any()
    if action == "count":
        calm, wild = good.step(0), bad.step(bad.action_space.n - 1)
    else:
        idle = np.zeros(SLOTS[action], int)
        calm, wild = good.step(idle), bad.step(idle + forbidden)
    assert wild[4].pop("illegal_actions") == forbidden.sum() and calm[4].pop("illegal_actions") == 0
    assert same(calm, wild)


def test_where_nothing_can_leave_a_count_still_sees_how_late_it_is() -> None:
    env = make(PRUNE).unwrapped
    env.reset(seed=0)
    seen = env.step(env.action_space.n - 1)[0]
    assert env.action_masks().tolist() == [True] + [False] * (env.action_space.n - 1)
    assert seen[-3] == pytest.approx(4 / PATCHES)


# One game on all faces ----------------------------------------------------------------------------
@GAME
@pytest.mark.parametrize("seed", range(2))
def test_gymnasium_faces_show_the_game(name: str, action: str, seed: int) -> None:
    kwargs = small(action=action)
    game = build_game(rules=RULES[name], **kwargs)
    game.seed(seed)
    seen = game.reset()
    single, vector = make(name, action=action).unwrapped, make_vec(name, 1, action=action)
    rows, batch = single.reset(seed=seed)[0], vector.reset(seed=seed)[0]
    for choice in moves(seed, single.action_space):
        assert seen is not None
        legal = single.action_masks().reshape(game.agents, -1)
        chosen = np.atleast_1d(choice)
        chosen = np.where(legal[np.arange(game.agents), chosen], chosen, 0)
        assert same(rows, batch[0]) and same(vector.action_masks()[0], legal.reshape(-1))
        own = rows.reshape(game.agents, -1)[:, : game.agent_dim]
        assert same(own, seen.agents[0].numpy())
        native = game.step(torch.from_numpy(chosen)[None])
        seen = native.observation
        choice = chosen if action != "count" else chosen[0]
        rows, reward, over, _, info = single.step(choice)
        batch, rewards, _, _, many = vector.step(np.asarray(choice)[None])
        assert reward == float(rewards[0]) == float(native.reward.sum())
        if over:
            break
        assert info["tokens_left"] == int(game.counts[-1][0]) == many["tokens_left"][0]
    assert native.outcome is not None
    assert info["correct"] == bool(native.outcome.correct[0])
    assert many["final_info"]["tokens_left"][0] == info["tokens_left"] < PATCHES
    assert many["final_info"]["episode"]["l"].tolist() == [DEPTH]


@GAME
def test_rows_of_the_vector_env_are_single_envs(name: str, action: str) -> None:
    envs, single = make_vec(name, 4, action=action), make(name, action=action).unwrapped
    batch, row = envs.reset(seed=3)[0], single.reset(seed=3)[0]
    for choice in moves(3, single.action_space):
        np.testing.assert_allclose(batch[0], row, atol=1e-4)
        batch, rewards, ends, _, _ = envs.step(np.stack([choice] * 4))
        row, reward, _, _, _ = single.step(choice)
        assert rewards[0] == pytest.approx(reward, rel=1e-3, abs=1e-3)
        if ends.all():
            break


@GAME
def test_vector_env_follows_gymnasiums_same_step_form(name: str, action: str) -> None:
    kwargs = small(max_cycles=2, action=action)
    mode = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
    ours = make_vec(name, 2, max_cycles=2, action=action)
    theirs = gym.make_vec(name, 2, vectorization_mode="sync", vector_kwargs=mode, **kwargs)
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    for one, other in zip(play_vector(ours, 0), play_vector(theirs, 0), strict=True):
        assert one[0].shape == other[0].shape and one[0].dtype == other[0].dtype
        assert other[-1].keys() <= one[-1].keys()
        for key in other[-1].keys() - {"final_info"}:
            assert one[-1][key].dtype == other[-1][key].dtype
            assert one[-1][key].shape == other[-1][key].shape


@GAME
def test_a_pickled_env_plays_on_alike(name: str, action: str) -> None:
    env = make(name, action=action).unwrapped
    assert same(play_env(pickle.loads(pickle.dumps(env)), 2), play_env(env, 2))


@MODULE
@pytest.mark.parametrize("seed", range(2))
def test_aec_and_parallel_and_gymnasium_agree(module: ModuleType, seed: int) -> None:
    name = {layer_merge_v0: MERGE, layer_prune_v0: PRUNE}[module]
    turns, cycles = module.env(**small()), module.parallel_env(**small())
    single = make(name).unwrapped
    turns.reset(seed=seed)
    seen, infos = cycles.reset(seed=seed)
    row, _ = single.reset(seed=seed)
    order: list[str] = []
    paid: dict[str, float] = {}
    decisions = next(rounds(seed, cycles))
    for agent in turns.agent_iter():
        view, reward, over, _, info = turns.last()
        if over:
            assert not view.any() and reward == pytest.approx(paid[agent])
            turns.step(None)
            continue
        assert same(view, row) and same(seen[agent], row) and same(infos[agent], info)
        assert same(turns.state(), cycles.state())
        assert all(not seen[other].any() for other in cycles.agents if other != agent)
        choice = decisions[len(order)]
        order.append(agent)
        turns.step(choice)
        seen, rewards, _, _, infos = cycles.step({agent: choice})
        row, paid[agent], _, _, _ = single.step(choice)
        assert rewards == {**dict.fromkeys(rewards, 0.0), agent: paid[agent]} == turns.rewards
    assert order == cycles.possible_agents and cycles.agents == turns.agents == []


# Mistakes and documentation -----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_cycles": DEPTH + 1}, f"max_cycles={DEPTH + 1} .* choose 1 to {DEPTH}"),
        ({"max_cycles": 2, "blocks": (1, 2, 3)}, "max_cycles=2 but 3 decision blocks"),
        ({"action": "many"}, "action='many'"),
        ({"reward": "alpha_beta"}, "unknown reward 'alpha_beta': choose from dora"),
        ({"grid": (0, 99)}, "asks for 99 pairs"),
        ({"colour": 1}, "unknown argument 'colour': choose from mask_in, render_mode"),
        ({"rules": "layer_prune"}, "rules='layer_prune': this environment has its own"),
        ({"batch_size": 3}, "batch_size=3: this environment has its own"),
        ({"render_mode": "video"}, "render_mode='video'"),
        ({"mask_in": "state"}, "mask_in='state'"),
        ({"action": "pairs"}, "action='pairs': agents of PettingZoo choose a 'count'"),
    ],
)
def test_mistakes_at_creation(kwargs: dict[str, Any], message: str) -> None:
    for face in (layer_merge_v0.env, layer_merge_v0.parallel_env):
        with pytest.raises(UserError, match=message) as caught:
            face(**small(**kwargs))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("one", [1, 1.0, True, np.float32(1), np.array(1), torch.tensor(1)])
def test_a_whole_number_is_an_action_in_whatever_form(one: Any) -> None:
    rewards = []
    for action in (1, one):
        env = layer_merge_v0.parallel_env(**small())
        env.reset(seed=0)
        _, reward, *_ = env.step(dict.fromkeys(env.agents, action))
        rewards.append(reward["layer_0"])
    assert rewards[0] == rewards[1] != 0


@pytest.mark.parametrize("action", [1.5, np.nan, -1, 8, 1e30, np.array([1]), "1", None, 1j])
def test_anything_else_is_no_action(action: Any) -> None:
    env = layer_merge_v0.parallel_env(**small())
    env.reset(seed=0)
    with pytest.raises(UserError, match="of 'layer_0' is out of range: choose 0 to 7"):
        env.step({"layer_0": action})


def test_mistakes_in_play() -> None:
    turns, cycles = (
        face(**small(max_cycles=2))
        for face in (layer_merge_v0.raw_env, layer_merge_v0.parallel_env)
    )
    for env, action in ((turns, 0), (cycles, {})):
        with pytest.raises(UserError, match=r"call reset\(\) first"):
            env.step(action)
        env.reset(seed=0)
    with pytest.raises(UserError, match="action 8 of 'layer_0' is out of range: choose 0 to 7"):
        turns.step(8)
    with pytest.raises(UserError, match="action 8 of 'layer_1' is out of range"):
        cycles.step({"layer_0": 0, "layer_1": 8})
    with pytest.raises(UserError, match="no action for 'layer_0'"):
        cycles.step({"layer_1": 0})
    single, pairs = make(MERGE).unwrapped, make(MERGE, action="pairs").unwrapped
    single.reset(seed=0)
    pairs.reset(seed=0)
    with pytest.raises(UserError, match="action 9 is out of range: choose 0 to 7"):
        single.step(9)
    with pytest.raises(UserError, match=r"action has shape \(1, 2\): give one of shape \(1,\)"):
        single.step([1, 2])
    with pytest.raises(UserError, match=r"neither 0 \(keep\) nor 1 \(merge\)"):
        pairs.step(np.full(32, 2))
    for _ in range(4):
        turns.step(None if turns.terminations[turns.agent_selection] else 0)
    with pytest.raises(UserError, match=r"no episode is running: call reset\(\) first"):
        turns.step(0)


# Pictures -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", list(RULES))
def test_frames_of_an_episode_have_one_size_and_differ(name: str) -> None:
    env = make(name, render_mode="rgb_array", max_cycles=3).unwrapped
    env.reset(seed=0)
    frames = [env.render()]
    for _ in range(3):
        env.step(2)
        frames.append(env.render())
    assert len({frame.shape for frame in frames}) == 1
    assert len({frame.tobytes() for frame in frames}) == 4


def test_text_tells_the_tokens_left() -> None:
    env = make(MERGE, render_mode="ansi", max_cycles=2).unwrapped
    env.reset(seed=0)
    env.step(3)
    text = env.render()
    assert "56" in text.splitlines()[0] and render._PRUNED not in text


@pytest.mark.parametrize("execution", ["masked", "padded"])
def test_pictures_show_the_tokens_there_are(execution: str) -> None:
    env = make(MERGE, render_mode="ansi", execution=execution).unwrapped
    env.reset(seed=1)
    for _ in range(DEPTH):
        info = env.step(1)[4]
    assert env.render().splitlines()[0].endswith(f": {info['tokens_left']}")


def test_merged_patches_have_their_mean() -> None:
    pixels = np.array([[[0] * 3, [100] * 3, [7] * 3, [200] * 3]], np.uint8)
    source = np.array([5, 5, 6, 5])
    means = render.group_means(pixels, source, (1, 4))
    assert means[0, :, 0].tolist() == [100, 100, 7, 100]
    lines = render.outlined(pixels, source, (1, 4))
    assert (lines != means).any(axis=2).tolist() == [[False, False, True, True]]
