"""Curves of the score in training: stages, result files, tables and pictures."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from command_line import mistake
from suite_tasks import TINY, TINY_MERGE, elsewhere, kept, run  # noqa: F401

from agents import parse_policy
from agents.policies import load_policy
from tokenenv import build_game
from tokenenv.game.policy import play
from tokenenv.suite import policy_from
from tokenenv.suite.opened import open_task
from tokenenv.suite.report import make_report
from tokenenv.suite.results import Result, Stage, read_result
from tokenenv.suite.stages import Stages

MAPPO = Path("suite/results/tiny-prune-v0/tiny-prune-v0-mappo-0.json")


@pytest.fixture(autouse=True)
def short_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thresholds chosen on few images: what they are does not matter here."""
    monkeypatch.setattr("tokenenv.suite.opened._SAMPLE", 16)


def test_a_stage_is_kept_at_the_start_and_once_in_so_many_episodes() -> None:
    opened = open_task(TINY)
    policy = parse_policy("norm:keep=0.5", 12)
    opened.keep_stage(lambda: policy, episodes=0)
    assert not opened.stages.kept  # nobody asked
    opened.stages = Stages(100)
    for episodes in range(0, 257, 32):
        opened.keep_stage(lambda: policy, episodes=episodes)
    opened.keep_stage(lambda: policy, episodes=96, part="other")
    # The end, 256, is the result itself.
    assert {at: sorted(parts) for at, parts in opened.stages.kept.items()} == {
        0: ["policy"], 96: ["other"], 128: ["policy"], 224: ["policy"],
    }  # fmt: skip


def test_a_curve_is_measured_stored_validated_and_shown(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("run tiny-prune-v0 --learner random --learner heuristic") == 0
    command = "run tiny-prune-v0 --learner mappo --learner untrained --seeds 0 --evaluate-every 128"
    assert run(command) == 0
    result = read_result(MAPPO)
    assert [stage.episodes for stage in result.curve] == [0, 128]
    assert result.made["evaluate_every"] == 128 and not result.curve[0].points[0].right
    # Before the first update it is the untrained start.
    start = read_result(MAPPO.with_name("tiny-prune-v0-untrained-0.json"))
    assert not start.curve
    assert [(p.knob, p.macs, p.top1) for p in result.curve[0].points] == [
        (p.knob, p.macs, p.top1) for p in start.points
    ]
    assert list(result.areas) == [0, 128, 256] and result.areas[256] == result.area
    capfd.readouterr()
    assert run("score suite") == 0
    table = capfd.readouterr().out
    assert "| learner | 0 | 128 | 256 |" in table and "| `mappo` |" in table
    assert run("plot suite --file curve.png") == 0 and Path("curve.png").stat().st_size > 20_000
    again = "suite run tiny-prune-v0 --learner mappo --seeds 0 --evaluate-every"
    assert "was made with --evaluate-every 128 and now it is 64" in mistake(f"{again} 64", capfd)
    assert run("run tiny-prune-v0 --learner mappo --seeds 0") == 0  # kept as it is
    whole = json.loads(MAPPO.read_text())
    whole["curve"][0]["episodes"] = 64
    MAPPO.write_text(json.dumps(whole))
    assert "it was edited" in mistake("suite score suite", capfd)


def test_a_replay_with_another_curve_differs(capsys: pytest.CaptureFixture[str]) -> None:
    command = "run tiny-prune-v0 --learner untrained --learner mappo --seeds 0 --evaluate-every 128"
    assert run(command) == 0
    stored = read_result(MAPPO)
    first, second = stored.curve
    changed = dataclasses.replace(first.points[0], macs=first.points[0].macs + 1e-4)
    edited = Stage(first.episodes, (changed, *first.points[1:]))
    MAPPO.write_text(json.dumps(dataclasses.replace(stored, curve=(edited, second)).as_json()))
    capsys.readouterr()
    assert run(f"validate {MAPPO}") == 1
    said = capsys.readouterr().out
    assert f"after 0 episodes, {changed.knob}" in said and "after 128" not in said


@pytest.mark.parametrize(
    "curve",
    [
        [{"episodes": 5, "points": []}],
        [{"episodes": -1, "points": None}],
        [{"points": []}],
        [{"episodes": 5, "points": [{"knob": "a", "macs": 0.1, "top1": 0.5}]}] * 2,
        ["x"],
    ],
)
def test_a_curve_that_is_none(curve: object, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("run tiny-prune-v0 --learner heuristic") == 0
    (path,) = Path("suite/results/tiny-prune-v0").iterdir()
    whole = json.loads(path.read_text())
    del whole["sha256"]
    path.write_text(json.dumps(whole | {"curve": curve}))
    assert "is no result of the suite" in mistake("suite score suite", capfd)


def test_curves_of_several_seeds_have_what_all_have() -> None:
    assert run("run tiny-prune-v0 --learner random --learner heuristic") == 0
    results = [read_result(path) for path in Path("suite/results/tiny-prune-v0").iterdir()]
    plain = next(result for result in results if result.learner == "heuristic")

    def made(seed: int, *episodes: int) -> Result:
        curve = tuple(Stage(at, plain.points[:1]) for at in episodes)
        return dataclasses.replace(plain, learner="mine", seed=seed, curve=curve)

    report = make_report([*results, made(0, 0, 64, 128), made(1, 0, 128)])
    (row,) = (row for row in report.rows if row.learner == "mine")
    assert [at for at, _ in row.curve] == [0, 128, 256]
    assert row.curve[-1][1] == row.interval and row.curve[0][1].iqm <= row.interval.iqm


def test_a_stopped_training_has_all_stages() -> None:
    command = "run tiny-prune-v0 --learner mappo --seeds 0 --evaluate-every 128"
    assert run(command) == 0
    before = kept()["tiny-prune-v0-mappo-0"]
    MAPPO.unlink()  # stopped while it was measured: the finished run is gone on with
    assert run(command) == 0
    assert kept()["tiny-prune-v0-mappo-0"]["curve"] == before["curve"]
    (folder,) = Path("suite/runs").iterdir()
    assert sorted(path.name for path in folder.glob("stage-*")) == [
        "stage-0000000000.safetensors", "stage-0000000128.safetensors",
    ]  # fmt: skip
    first = load_policy(folder / "stage-0000000000.safetensors")
    last = load_policy(folder / "policy.safetensors")
    pairs = zip(first.parameters(), last.parameters(), strict=True)
    assert not all(torch.equal(one, other) for one, other in pairs)


def test_stable_baselines3_keeps_stages_of_all_its_policies() -> None:
    pytest.importorskip("stable_baselines3")
    assert run("run tiny-merge-v0 --learner sb3:ppo --seeds 0 --evaluate-every 96") == 0
    (path,) = Path("suite/results/tiny-merge-v0").iterdir()
    result = read_result(path)
    # A third of 192 episodes for each, in rollouts of 64: only the start is before the end.
    assert [(stage.episodes, len(stage.points)) for stage in result.curve] == [(0, 3)]


def test_a_network_of_two_numbers_has_a_threshold() -> None:
    torch.manual_seed(0)
    game = build_game(batch_size=1, share=False)
    net = torch.nn.Linear(game.agent_dim + game.shared_dim, 2)
    policy = policy_from(net, game)
    assert policy.adjustable and policy.threshold == 0.5
    images = open_task(TINY).train.subset(8, seed=0).batch(torch.arange(8)).images
    plain = policy_from(lambda seen: net(seen).argmax(-1), game, macs=1.0)
    assert not plain.adjustable
    at_half = play(game.backbone, policy, images)
    assert torch.equal(at_half.logits, play(game.backbone, plain, images).logits)
    left = []
    for policy.threshold in (0.1, 0.5, 0.9):
        left.append(play(game.backbone, policy, images).tokens.visual_alive.sum().item())
    assert left[0] > left[1] > left[2]
    assert copy.deepcopy(policy).threshold == 0.9
