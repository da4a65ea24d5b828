"""Other libraries' learners: TorchRL's form of the games, and the examples, each of which runs."""

from __future__ import annotations

import builtins
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PATCHES, small

from tokenenv import UserError, build_game

ROOT = Path(__file__).resolve().parents[2]
MERGE, PRUNE, TOKENS = "tokenenv/LayerMerge-v0", "tokenenv/LayerPrune-v0", "tokenenv/TokenPrune-v0"
GAME = pytest.mark.parametrize(
    ("id", "rules", "kwargs"),
    [
        (TOKENS, "token_prune", {"reward": "cooperative"}),
        (MERGE, "layer_merge", {"action": "count"}),
        (MERGE, "layer_merge", {"action": "pairs"}),
        (PRUNE, "layer_prune", {"action": "count"}),
        (PRUNE, "layer_prune", {"action": "tokens"}),
    ],
    ids=["tokens", "merge-count", "merge-pairs", "prune-count", "prune-tokens"],
)


def torchrl_env(id: str, num_envs: int = 3, **kwargs: Any) -> Any:
    pytest.importorskip("torchrl", reason="TorchRL is not installed: pip install '.[torchrl]'")
    from tokenenv.envs.torchrl import TorchRLEnv

    return TorchRLEnv(id, num_envs, **small(**kwargs))


# TorchRL ------------------------------------------------------------------------------------------
@GAME
def test_torchrl_checks_the_specs(id: str, rules: str, kwargs: dict[str, Any]) -> None:
    env = torchrl_env(id, **kwargs)
    from torchrl.envs.utils import check_env_specs

    check_env_specs(env)


@GAME
def test_torchrl_shows_the_tensor_game(id: str, rules: str, kwargs: dict[str, Any]) -> None:
    env = torchrl_env(id, **kwargs)
    game: Any = build_game(rules=rules, batch_size=3, **small(**kwargs))  # type: ignore[arg-type]
    env.set_seed(5)
    game.seed(5)
    data, generator = env.reset(), torch.Generator().manual_seed(0)
    for _ in range(2):
        seen, over = game.reset(), False
        while not over:
            agents = data["agents"]
            assert agents.batch_size == (3, game.agents)
            own, shared = agents["observation"].split((game.agent_dim, game.shared_dim), dim=-1)
            assert torch.equal(own, seen.agents.float())
            acting = seen.active | (game.agents == 1)  # who counts sees the image in any case
            assert torch.equal(shared, seen.shared[:, None] * acting[..., None])
            assert torch.equal(data["state"], seen.state)
            assert torch.equal(agents["active_mask"], seen.active)
            if seen.legal is not None:
                assert torch.equal(agents["action_mask"], seen.legal)
            assert not data["done"].any() and not agents["done"].any()
            assert (data["info", "tokens_left"][:, 0] == game.counts[-1]).all()

            action = torch.multinomial(
                agents["action_mask"].flatten(0, 1).float(), 1, generator=generator
            ).reshape(3, game.agents)
            data["agents", "action"] = action
            done, data = env.step_and_maybe_reset(data)
            turn = game.step(action)
            after, over = done["next"], turn.observation is None
            reward = turn.reward.expand(-1, game.agents)[..., None]
            assert torch.equal(after["agents", "reward"], reward)
            for end in ("done", "terminated"):
                assert (after[end] == over).all() and (after["agents", end] == over).all()
            assert not after["truncated"].any() and not after["info", "illegal_actions"].any()
            seen = turn.observation
        assert torch.equal(after["info", "correct"][:, 0], turn.outcome.correct.bool())
        assert not after["agents", "observation"].any()


def test_torchrl_seed_decides_whole_episodes() -> None:
    def rollout(seed: int) -> Any:
        env = torchrl_env(TOKENS, reward="cooperative")
        env.set_seed(seed)
        torch.manual_seed(0)
        return env.rollout(9, break_when_any_done=False)

    one, other, third = rollout(1), rollout(1), rollout(2)
    assert one.batch_size == (3, 9) and one["next", "done"].sum() == 9
    assert (one == other).all()
    assert not torch.equal(one["state"], third["state"])


@GAME
def test_a_torchrl_clone_repeats_what_the_original_does(
    id: str, rules: str, kwargs: dict[str, Any]
) -> None:
    env = torchrl_env(id, **kwargs)

    def go_on(env: Any, data: Any, seed: int) -> list[Any]:
        generator, heard, data = torch.Generator().manual_seed(seed), [], data.clone()
        for _ in range(env.game.steps + 2):  # into the next episode
            legal = data["agents", "action_mask"].flatten(0, 1).float()
            action = torch.multinomial(legal, 1, generator=generator).reshape(3, env.game.agents)
            done, data = env.step_and_maybe_reset(data.set(("agents", "action"), action))
            heard += [done["next"], data]
        return heard

    env.set_seed(0)
    data = env.reset()
    clone, other = env.clone(), env.clone()
    go_on(other, data, 1)
    one, two = go_on(env, data, 2), go_on(clone, data, 2)
    assert all((a == b).all() for a, b in zip(one, two, strict=True))


def test_torchrl_action_masks() -> None:
    env = torchrl_env(TOKENS)
    from torchrl.envs import ActionMask, TransformedEnv

    torch.manual_seed(0)
    free = env.rollout(3)["next", "info", "illegal_actions"]
    assert (free[:, 1:] > 0).all()  # of those that were pruned some said "keep"
    keys = {"action_key": ("agents", "action"), "mask_key": ("agents", "action_mask")}
    masked = TransformedEnv(torchrl_env(TOKENS), ActionMask(**keys)).rollout(3)
    assert not masked["next", "info", "illegal_actions"].any()
    assert not masked["agents", "action"][~masked["agents", "active_mask"]].any()


def test_torchrl_shared_reward_is_one() -> None:
    kwargs = {"reward": "cooperative", "reward_kwargs": {"beta": 0.2, "shared": True}}
    reward = torchrl_env(TOKENS, **kwargs).rollout(3)["next", "agents", "reward"]
    assert (reward == reward[:, :, :1]).all() and reward.unique().numel() > 3


def test_torchrl_bad_input() -> None:
    env = torchrl_env(TOKENS)
    with pytest.raises(UserError, match="unknown id 'tokenenv/No-v0': choose from tokenenv/Token"):
        torchrl_env("tokenenv/No-v0")
    with pytest.raises(UserError, match="device 'meta' is not the game's cpu: give device= at"):
        env.to("meta")
    assert env.to("cpu") is env
    data = env.reset()
    some = torch.tensor([[True], [False], [False]])
    data["_reset"], data["agents", "_reset"] = some, some[:, None].expand(3, PATCHES, 1)
    with pytest.raises(UserError, match="some images can't be reset without the others"):
        env.reset(data)
    data = env.reset()
    data["agents", "action"] = torch.full((3, PATCHES), 2)
    with pytest.raises(UserError, match=r"action 2 is neither 0 \(prune\) nor 1 \(keep\)"):
        env.step(data)


@pytest.mark.parametrize("name", ["torchrl", "benchmarl"])
def test_a_missing_library_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "benchmarl":
        pytest.importorskip("torchrl", reason="BenchMARL's tasks need TorchRL")
    real = builtins.__import__

    def without(module: str, *args: Any, **kwargs: Any) -> Any:
        if module.split(".")[0] == name:
            raise ImportError(f"No module named '{name}'")
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, f"tokenenv.envs.{name}", raising=False)
    with pytest.raises(UserError, match=rf"is not installed: pip install 'tokenenv\[{name}\]'"):
        importlib.import_module(f"tokenenv.envs.{name}")


# BenchMARL ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "agents"), [("TOKEN_PRUNE", PATCHES), ("LAYER_MERGE", 1), ("LAYER_PRUNE", 1)]
)
def test_benchmarl_task(name: str, agents: int) -> None:
    pytest.importorskip("benchmarl", reason="BenchMARL is not installed: '.[benchmarl]'")
    from tokenenv.envs.benchmarl import GameTask

    task: Any = GameTask[name].get_task(config=small(max_cycles=2))
    env = task.get_env_fun(num_envs=3, continuous_actions=False, seed=1, device="cpu")()
    assert env.batch_size == (3,) and task.max_steps(env) == 2
    assert len(task.group_map(env)["agents"]) == agents
    assert task.observation_spec(env)["agents"].shape == (agents,)
    assert list(task.observation_spec(env)["agents"].keys()) == ["observation"]
    actions = env.game.actions
    assert task.action_mask_spec(env)["agents", "action_mask"].shape == (agents, actions)
    assert task.action_spec(env)["agents", "action"].shape == (agents,)
    assert task.state_spec(env)["state"].shape == (env.game.state_dim,)
    logged = task.log_info(env.rollout(2))
    assert 0 < logged["game/tokens_left"] <= PATCHES and 0 <= logged["game/correct"] <= 1
    assert task.log_info(env.rollout(1)) == {}


# The examples -------------------------------------------------------------------------------------
EXAMPLES = {
    "single_file_mappo": ((), ["--num-envs", "8", "--episodes", "1"]),
    "sb3_maskable_ppo": (("stable_baselines3", "sb3_contrib"), ["--num-envs", "8"]),
    "supersuit_sb3": (("supersuit", "stable_baselines3"), ["--copies", "2"]),
    "torchrl_mappo": (("torchrl.objectives.multiagent.mappo",), ["--num-envs", "8"]),
    "benchmarl_mappo": (("benchmarl",), ["--num-envs", "8"]),
    "tianshou_dqn": (("tianshou",), ["--copies", "2", "--episodes", "4", "--test-episodes", "4"]),
    "rllib_ppo": (("ray.rllib",), ["--episodes", "4"]),
}


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_the_example_runs(name: str, tmp_path: Path) -> None:
    libraries, options = EXAMPLES[name]
    for library in libraries:
        pytest.importorskip(library, reason=f"{library} is not installed", exc_type=ImportError)
    options = ["--updates", "2", "--seed", "1", *options]
    returns = _returns(_run(name, tmp_path, *options))
    assert len(returns) >= 3, "before, after, and at least one in between"
    assert all(-100 < value < 100 for value in returns)
    assert not list(tmp_path.iterdir()), "an example leaves nothing behind"
    if name == "single_file_mappo":
        assert _returns(_run(name, tmp_path, *options)) == returns, "a seed is a run"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "updates"), [("single_file_mappo", 25), ("torchrl_mappo", 25), ("rllib_ppo", 6)]
)
def test_the_example_learns(name: str, updates: int, tmp_path: Path) -> None:
    for library in EXAMPLES[name][0]:
        pytest.importorskip(library, reason=f"{library} is not installed", exc_type=ImportError)
    returns = _returns(_run(name, tmp_path, "--updates", str(updates)))
    assert returns[-1] > returns[0] + 0.05


def test_the_single_file_imports_only_the_environment() -> None:
    text = (ROOT / "examples" / "single_file_mappo.py").read_text()
    imported = set(re.findall(r"^(?:from|import) ([a-z_]+)", text, re.MULTILINE))
    ours = {"argparse", "time", "gymnasium", "torch", "tokenenv"}
    assert imported - {"__future__"} == ours and len(text.splitlines()) <= 300


def _run(name: str, folder: Path, *options: str) -> str:
    """What the example prints, run in an empty folder."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "examples" / f"{name}.py"), *options],
        capture_output=True, text=True, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def _returns(text: str) -> list[float]:
    return [float(value) for value in re.findall(r"(?:return|before|after) (-?\d+\.\d+)", text)]
