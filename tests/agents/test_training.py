"""Stopping, resuming, seeds, checkpoints, which policy is best."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import backbone, same, source

from agents.learners.mappo import MAPPO
from agents.policies.actor import ActorPolicy
from agents.systems.rl4evit import RL4EViTConfig
from agents.training import run_folder
from agents.training.judgement import Judgement
from agents.training.trainer import CHECKPOINT, Trainer, _Clock
from agents.workers import ALONE
from tokenenv.cli.main import main
from tokenenv.errors import UserError
from tokenenv.game.build import build_game
from tokenenv.measure import evaluation
from tokenenv.storage import (
    read_tensors,
    write_tensors,
)

CONFIG = RL4EViTConfig(
    updates=4, batch=8, repeats=2, hidden=(8,), epochs=2, minibatches=2, evaluate_every=2
)
CALLS = 2 * 2  # of MAPPO._descend in an update


class Crash(Exception):
    """What a killed process leaves on disk, an exception nobody expects leaves too."""


def trainer(out: Path, seed: int = 0, **description: Any) -> Trainer:
    """A small run on an untrained model, with everything real."""
    torch.manual_seed(seed)
    fit, held_back = source().split(0.2, seed)
    game = build_game(
        model=backbone(),
        data=fit,
        features=CONFIG.features,
        share=CONFIG.share,
        reward="cooperative",
        batch_size=CONFIG.batch,
        repeats=CONFIG.repeats,
    )
    game.seed(seed)
    policy = CONFIG.policy(game, "small")

    def judge(policy: ActorPolicy) -> Judgement:
        found = evaluation.evaluate(backbone(), policy, held_back)
        return Judgement(found.saving, found.losses.mean().item(), found.drop)

    return Trainer(
        CONFIG.learner(policy, game, seed),
        game.stream,
        judge,
        out,
        updates=CONFIG.updates,
        evaluate_every=CONFIG.evaluate_every,
        target_saving=CONFIG.target_saving,
        config={"seed": seed, "beta": CONFIG.beta} | description,
    )


def ending(out: Path) -> Any:
    """All that the last checkpoint holds: weights, optimisers, best policy, history; no times."""
    tensors, saved = read_tensors(out / CHECKPOINT)
    assert saved.pop("seconds") > 0
    return [tensors, saved]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("unbroken")
    trainer(out).run()
    return ending(out)


def on_call(number: int, act: Callable[[], Any], method: Callable[..., Any]) -> Callable[..., Any]:
    """``method``, but before its ``number``-th call ``act()``."""
    calls = 0

    def wrapped(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            act()
        return method(*args)

    return wrapped


def crash() -> None:
    raise Crash


def test_a_run_does_its_updates_and_keeps_a_record(unbroken: Any) -> None:
    saved = unbroken[1]
    assert saved["done"] == 4
    assert [row["update"] for row in saved["history"]] == [0, 1, 2, 2, 3, 4, 4]
    assert [row["update"] for row in saved["history"] if "saving" in row] == [0, 2, 4]


@pytest.mark.parametrize("call", [1, 3, 2 * CALLS + 2, 4 * CALLS])
def test_a_run_killed_in_an_update_resumes_exactly(
    call: int, tmp_path: Path, unbroken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(MAPPO, "_descend", on_call(call, crash, MAPPO._descend))
        trainer(tmp_path).run()
    assert read_tensors(tmp_path / CHECKPOINT)[1]["done"] == (call - 1) // (2 * CALLS) * 2

    again = trainer(tmp_path)
    torch.manual_seed(99)  # whatever else drew numbers in between
    again.resume()
    again.run()
    assert same(ending(tmp_path), unbroken)


@pytest.mark.parametrize("save", [2, 3])
def test_a_run_killed_while_it_writes_the_checkpoint_resumes_exactly(
    save: int, tmp_path: Path, unbroken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(os, "replace", on_call(save, crash, os.replace))
        trainer(tmp_path).run()
    again = trainer(tmp_path)
    again.resume()
    assert again.done == 2 * (save - 2)
    again.run()
    assert same(ending(tmp_path), unbroken)


class Two:
    """Workers as one of two processes sees them."""

    count = 2

    def __init__(self, rank: int, told: list[Any]) -> None:
        self.rank, self.told = rank, told

    def gather(self, value: Any) -> list[Any]:
        return [value, *self.told]


def test_each_process_goes_on_with_its_own_order(tmp_path: Path) -> None:
    first = trainer(tmp_path)
    first.workers, first.updates = ALONE, 0
    first.run()  # judges the start
    further = {**first.order.state_dict(), "position": 17}
    first.workers = Two(0, [further])
    first._save(_Clock(0.0, 0))
    for rank, position in ((0, first.order.state_dict()["position"]), (1, 17)):
        other = trainer(tmp_path)
        other.workers = Two(rank, [])
        other.resume()
        assert other.order.state_dict()["position"] == position
    alone = trainer(tmp_path)
    alone.resume()
    assert alone.order.state_dict()["position"] != 17


def test_a_finished_run_resumes_to_itself(tmp_path: Path, unbroken: Any) -> None:
    trainer(tmp_path).run()
    again = trainer(tmp_path)
    again.resume()
    again.run()
    assert same(ending(tmp_path), unbroken)


def test_ctrl_c_finishes_the_update_and_resumes_exactly(
    tmp_path: Path, unbroken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT)
    stopped = trainer(tmp_path)
    interrupt = on_call(2 * CALLS + 2, lambda: signal.raise_signal(signal.SIGINT), MAPPO._descend)
    with monkeypatch.context() as patch:
        patch.setattr(MAPPO, "_descend", interrupt)
        stopped.run()
    assert (stopped.stopped, stopped.done) == (True, 3)
    assert stopped.best_state
    assert signal.getsignal(signal.SIGINT) == before

    again = trainer(tmp_path)
    again.resume()
    assert again.done == 3
    again.run()
    assert not again.stopped
    assert same(ending(tmp_path), unbroken)


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(MAPPO, "_descend", on_call(CALLS + 1, twice, MAPPO._descend))
    hasty = trainer(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        hasty.run()
    assert hasty.done == 1
    assert signal.getsignal(signal.SIGINT) == before


def test_the_seed_decides(tmp_path: Path, unbroken: Any) -> None:
    for name, seed in (("same", 0), ("other", 1)):
        trainer(tmp_path / name, seed).run()
    assert same(ending(tmp_path / "same"), unbroken)
    weights = "state.learner.policy.actor.head.weight"
    assert not torch.equal(ending(tmp_path / "other")[0][weights], unbroken[0][weights])


def test_resuming_with_another_setting_names_it(tmp_path: Path) -> None:
    trainer(tmp_path).run()
    with pytest.raises(UserError, match=rf"beta=0.5.*with beta={CONFIG.beta}.*another --out"):
        trainer(tmp_path, beta=0.5).resume()
    with pytest.raises(UserError, match=r"new=1.*started with new=None"):
        trainer(tmp_path, new=1).resume()


def test_a_checkpoint_with_values_that_are_not_finite_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path).run()
    path = tmp_path / CHECKPOINT
    tensors, saved = read_tensors(path)
    floats = [name for name, t in tensors.items() if t.is_floating_point()]
    policy, average, best = (
        next(name for name in floats if name.startswith("state." + start) and end in name)
        for start, end in (("learner", "skip.weight"), ("learner", "exp_avg"), ("best_state", ""))
    )
    nan, huge = torch.tensor(torch.nan), torch.tensor(1e300, dtype=torch.float64)
    for name, value, words in (
        (policy, nan, "NaN or infinite"),
        (average, nan, "NaN or infinite"),
        (best, nan, "NaN or infinite"),
        (best, huge, "NaN or infinite"),  # not in float32
        (policy, torch.tensor(1), "holds int64, not float32"),
        (best, torch.tensor(True), "holds bool, not float32"),
    ):
        write_tensors(path, tensors | {name: value.expand(tensors[name].shape)}, saved)
        with pytest.raises(UserError, match=words) as error:
            trainer(tmp_path).resume()
        assert f"'{name}'" in str(error.value)
        assert "another --out" in str(error.value)
    write_tensors(path, tensors, saved | {"best": saved["best"] | {"saving": float("nan")}})
    with pytest.raises(UserError, match="NaN is no finite number"):
        trainer(tmp_path).resume()


def test_resuming_nothing_or_rubbish_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing to resume.*leave --resume out"):
        trainer(tmp_path).resume()
    whole = trainer(tmp_path)
    whole.run()
    path = tmp_path / CHECKPOINT
    content = path.read_bytes()
    for bad in (content[: len(content) // 2], b"", b"\x00" * 100, b"x" + content):
        path.write_bytes(bad)
        with pytest.raises(UserError, match="cannot read") as error:
            trainer(tmp_path).resume()
        assert "\n" not in str(error.value)
    whole.learner.policy.save(path)
    with pytest.raises(UserError, match="not a checkpoint of this version"):
        trainer(tmp_path).resume()


def test_events_have_every_step_once_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    broken = trainer(tmp_path)
    with (
        monkeypatch.context() as patch,
        pytest.raises(Crash),
        run_folder.events(tmp_path, broken) as log,
    ):
        patch.setattr(MAPPO, "_descend", on_call(3 * CALLS + 1, crash, MAPPO._descend))
        broken.run(log)
    assert broken.done == 3  # logged, and later than the checkpoint
    again = trainer(tmp_path)
    again.resume()
    # Files are read in the order of their names: a second, then a count without leading zeros.
    time.sleep(1.1)
    with run_folder.events(tmp_path, again) as log:
        again.run(log)

    events = EventAccumulator(str(tmp_path)).Reload()
    assert [e.step for e in events.Scalars("reward")] == [1, 2, 3, 4]
    assert [e.step for e in events.Scalars("held_back/saving")] == [0, 2, 4]
    rewards = [row["reward"] for row in again.history if "reward" in row]
    assert [e.value for e in events.Scalars("reward")] == pytest.approx(rewards)


COMMAND = (
    "train rl4evit --images 60 --set updates=3 --set evaluate_every=1 --set batch=8 "
    "--set hidden=8 --set epochs=2 --set minibatches=2 --set calibrate=2 --out"
)
KILLED = f"""
import os, signal
from agents.learners.mappo import MAPPO
from tokenenv.cli.main import main

calls, descend = 0, MAPPO._descend

def last(*args):
    global calls
    calls += 1
    if calls == {CALLS + 2}:
        os.kill(os.getpid(), signal.SIGKILL)
    return descend(*args)

MAPPO._descend = last
main("{COMMAND} broken".split())
"""


def test_a_killed_command_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED]
    killed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr

    monkeypatch.chdir(tmp_path)
    assert read_tensors(Path("broken", CHECKPOINT))[1]["done"] == 1
    assert not Path("broken", "policy.safetensors").exists()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main(f"{COMMAND} broken --resume".split()) == 0
        assert main(f"{COMMAND} whole".split()) == 0
    finally:
        torch.set_num_threads(threads)
    assert same(ending(Path("broken")), ending(Path("whole")))
    policies = [Path(out, "policy.safetensors").read_bytes() for out in ("broken", "whole")]
    assert policies[0] == policies[1]
    reports = [json.loads(Path(out, "report.json").read_text()) for out in ("broken", "whole")]
    for report in reports:
        for key in ("images_per_s", "images_per_s_dense", "training_seconds"):
            assert report.pop(key) > 0
    assert reports[0] == reports[1]
