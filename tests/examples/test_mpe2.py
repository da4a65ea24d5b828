"""The benchmark of our MAPPO beside TorchRL's on MPE2: budgets of a second."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from agents import PettingZooArena
from tokenenv.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TASKS = ("simple_spread_v3", "simple_reference_v3")
BOTH = pytest.mark.parametrize("learner", ["tokenenv", "torchrl"])


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark as a module."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("mpe2_mappo")


def need(*libraries: str) -> None:
    for name in libraries:
        pytest.importorskip(name, reason=f"{name} is not installed: pip install '.[mpe2]'")


def libraries(learner: str) -> list[str]:
    return ["mpe2", *(["torchrl.objectives.multiagent"] if learner == "torchrl" else [])]


def test_both_learn_both_tasks_a_little(bench: Any, tmp_path: Path, capsys: Any) -> None:
    need(*libraries("torchrl"))
    command = ["--out", str(tmp_path / "o"), "--steps", "1600", "--seeds", "1"]
    assert bench.main(command) == 0
    rows = json.loads((tmp_path / "o" / "summary.json").read_text())["rows"]
    assert {(r["task"], r["learner"]) for r in rows} == {
        (task, learner) for task in TASKS for learner in bench.LEARNERS
    }
    for row in rows:
        run = json.loads((tmp_path / "o" / f"{row['task']}-{row['learner']}-0.json").read_text())
        assert len(run["curve"]) == 2 and all(-150 < value < 0 for value in run["curve"])
        assert row["start"][0] == run["curve"][0] and row["final"][0] == run["curve"][1]
        assert run["settings"]["steps"] == 1600 and run["seconds"] > 0
    assert (tmp_path / "o" / "curves.png").stat().st_size > 10_000
    assert "simple_reference_v3  torchrl" in capsys.readouterr().out


@BOTH
def test_a_seed_is_a_run(bench: Any, learner: str) -> None:
    need(*libraries(learner))
    settings = bench.Settings(steps=400, copies=4, minibatches=2)
    task = TASKS[1]
    one, other, third = (
        bench.train(task, learner, seed, settings, lambda steps: None)["curve"]
        for seed in (0, 0, 1)
    )
    assert len(one) == 2 and one == other and one != third


@BOTH
def test_the_return_is_that_of_the_episodes(bench: Any, learner: str) -> None:
    """Every reward of the arena, per agent and episode, counted another way."""
    need(*libraries(learner))
    module = importlib.import_module(f"mpe2.{TASKS[0]}")
    arena = PettingZooArena(module.parallel_env, 2)
    step, paid = arena.step, []

    def remember(action: torch.Tensor) -> Any:
        result = step(action)
        paid.append(result.reward)
        return result

    arena.step = remember  # type: ignore[method-assign]
    returns = bench.LEARNERS[learner](arena, bench.Settings(copies=2, episodes=2), 0)
    got = [next(returns) for _ in range(2)]
    for value, rewards in zip(got, (paid[:50], paid[50:]), strict=True):
        assert_close(value, sum(r.mean(1).sum().item() for r in rewards) / 4, rtol=1e-5, atol=1e-5)


def test_the_arena_plays_what_torchrls_own_wrapper_plays() -> None:
    need("mpe2", "torchrl")
    from mpe2 import simple_spread_v3
    from torchrl.envs import PettingZooWrapper

    env = PettingZooWrapper(
        simple_spread_v3.parallel_env(), return_state=True, done_on_any=False, seed=7
    )
    arena = PettingZooArena(simple_spread_v3.parallel_env, 1, seed=7)
    data, seen = env.reset(seed=7), arena.reset()
    generator = torch.Generator().manual_seed(0)
    for _ in range(25):
        assert_close(seen.agents[0], data["agent", "observation"])
        assert_close(seen.state[0], data["state"])
        action = torch.randint(5, (1, 3), generator=generator)
        data["agent", "action"] = action[0]
        after = env.step(data)["next"]
        step = arena.step(action)
        assert_close(step.reward[0], after["agent", "reward"][:, 0])
        seen, data = step.observation, after
    assert step.done.all() and after["truncated"].all() and not after["terminated"].any()
    assert step.cut.active.all()
    assert_close(step.cut.agents[0], after["agent", "observation"])
    assert_close(step.cut.state[0], after["state"])


def test_torchrl_is_told_of_the_time_limit(bench: Any) -> None:
    """The last transition of an episode is done, not terminated, and leads to its own last view."""
    need(*libraries("torchrl"))
    from mpe2 import simple_spread_v3

    arena = PettingZooArena(simple_spread_v3.parallel_env, 2)
    first = arena.reset()

    def still(row: Any) -> Any:
        row["agents", "action"] = torch.zeros(2, 3, dtype=torch.long)
        return row

    data, after = bench.play(arena, still, first, 30)
    ends = data["next", "agents", "done"][..., 0]
    assert torch.equal(ends.nonzero()[:, 1].unique(), torch.tensor([24]))
    assert not data["next", "agents", "terminated"].any()
    views, following = data["agents", "observation"], data["next", "agents", "observation"]
    assert torch.equal(views[:, 1:25], following[:, :24])
    assert not torch.equal(views[:, 25], following[:, 24]), "another episode began"
    assert torch.equal(views[:, 26:], following[:, 25:29])
    assert torch.equal(after.agents, following[:, -1])


def test_torchrl_draws_its_actions(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its actors' default is the likeliest action, which explores nothing."""
    need(*libraries("torchrl"))
    module = importlib.import_module(f"mpe2.{TASKS[0]}")
    rollouts, play = [], bench.play
    monkeypatch.setattr(bench, "play", lambda *args: rollouts.append(play(*args)) or rollouts[-1])
    next(bench.torchrls(PettingZooArena(module.parallel_env, 2), bench.Settings(copies=2), 0))
    agents = rollouts[0][0]["agents"]
    likeliest = agents["action"] == agents["logits"].argmax(-1)
    expected = agents["logits"].softmax(-1).amax(-1).mean()
    assert abs(likeliest.float().mean() - expected) < 0.1 and expected < 0.7


def fake(curve: list[float], settings: dict[str, Any], one: tuple[str, str, int]) -> dict[str, Any]:
    keys = dict(zip(("task", "learner", "seed"), one, strict=True))
    return {**keys, "settings": settings, "seconds": 2.0, "curve": curve}


def test_the_summary_by_hand(bench: Any) -> None:
    runs = [
        fake([float(i + seed) for i in range(20)], {}, (TASKS[0], "tokenenv", seed))
        for seed in range(3)
    ]
    (row,) = bench.summarise(runs)
    assert row["seeds"] == 3 and row["start"] == [1.0, 0.0, 2.0]
    assert row["final"] == [19.5, 18.5, 20.5] and row["area"] == [10.5, 9.5, 11.5]
    assert "19.50 [18.50, 20.50]" in bench.table([row])


@pytest.fixture
def trained(bench: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """Runs cost nothing; what was asked for."""
    asked: list[tuple[str, str, int]] = []

    def train(task: str, learner: str, seed: int, settings: Any, progress: Any) -> dict[str, Any]:
        asked.append((task, learner, seed))
        progress(settings.updates * settings.per_update)
        return fake([1.0] * settings.updates, bench.as_json(settings), asked[-1])

    monkeypatch.setattr(bench, "train", train)
    monkeypatch.setattr(bench, "library", lambda name: None)
    return asked


def test_ctrl_c_keeps_what_is_done(
    bench: Any, trained: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    command = ["--out", str(tmp_path), "--seeds", "2", "--steps", "1600"]
    train = bench.train

    def stop(*args: Any) -> Any:
        if len(trained) == 3:
            raise KeyboardInterrupt
        return train(*args)

    monkeypatch.setattr(bench, "train", stop)
    assert bench.main(command) == 130
    assert "interrupted: 3 of 8 runs are done" in capsys.readouterr().out
    first = list(trained)
    monkeypatch.setattr(bench, "train", train)
    assert bench.main(command) == 0
    assert len(trained) == 8 == len(set(trained)) and trained[:3] == first
    assert bench.main(command) == 0 and len(trained) == 8, "nothing is made twice"


def test_a_run_of_other_settings_or_none_is_named(
    bench: Any, trained: list[Any], tmp_path: Path, capsys: Any
) -> None:
    command = ["--out", str(tmp_path), "--seeds", "1", "--learners", "tokenenv"]
    assert bench.main([*command, "--steps", "1600"]) == 0
    capsys.readouterr()
    assert bench.main([*command, "--steps", "3200"]) == 2
    assert "was made with steps=1600, not 3200: choose another --out" in capsys.readouterr().err
    (tmp_path / f"{TASKS[0]}-tokenenv-0.json").write_text("{")
    assert bench.main([*command, "--steps", "1600"]) == 2
    assert "cannot read the run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--tasks no_v0", "unknown task 'no_v0': choose from simple_spread_v3, simple_ref"),
        ("--learners rllib", "unknown learner 'rllib': choose from tokenenv, torchrl"),
        ("--seeds 0", "--seeds 0 is too small; use at least 1"),
        ("--steps 799", "--steps 799 is too small; use at least 800"),
    ],
)
def test_bad_input(bench: Any, tmp_path: Path, capsys: Any, options: str, message: str) -> None:
    assert bench.main(["--out", str(tmp_path / "o"), *options.split()]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_place_that_cannot_be_written_to(
    bench: Any, trained: list[Any], tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "file").touch()
    assert bench.main(["--out", str(tmp_path / "file")]) == 2
    assert "cannot write to" in capsys.readouterr().err and not trained


@pytest.mark.parametrize("name", ["mpe2", "torchrl"])
def test_a_missing_library_is_named(bench: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"cannot use .*: pip install 'tokenenv\[mpe2\]'"):
        bench.library({"mpe2": "mpe2", "torchrl": "torchrl.objectives.multiagent"}[name])
