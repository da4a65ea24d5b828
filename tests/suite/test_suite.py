"""``tokenenv suite``: results, going on after Ctrl-C, tables, the picture, mistakes."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import mistake
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from suite_tasks import TINY, TINY_MERGE, elsewhere, kept, run  # noqa: F401

from agents.policies.words import parse_policy
from agents.systems.registry import SYSTEMS
from agents.systems.settings import with_settings, word
from tokenenv import open_source
from tokenenv.errors import UserError
from tokenenv.measure import evaluation
from tokenenv.suite import learners as suite_learners
from tokenenv.suite import report, results
from tokenenv.suite import run as suite_run
from tokenenv.suite.opened import OpenTask, open_task, spread
from tokenenv.suite.results import Point, Result, hits, references, unpack_hits
from tokenenv.suite.sb3 import PENALTIES
from tokenenv.suite.tasks import POINTS, TASKS, Task, find_task
from tokenenv.vit.load import load_backbone

SHIPPED = [task for task in TASKS if references(task.name)]


def test_run_score_plot_and_marl_eval(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    learners = "--learner random --learner heuristic --learner untrained"
    assert run(f"run tiny-prune-v0 {learners}") == 0
    found = kept()
    assert len(found) == 2 + 1 + 2  # the heuristic knows no seed
    first = found["tiny-prune-v0-random-0"]
    assert [point["knob"] for point in first["points"]] == ["random:keep=0.5", "random:keep=0.2"]
    backbone = load_backbone()
    source = open_source("digits", backbone.model, split="test", limit=40)
    for point in first["points"]:
        policy = parse_policy(f"{point['knob']},seed=0", 12)
        again = evaluation.evaluate(backbone, policy, source)
        right = (again.reduced == again.labels).numpy()
        assert point["top1"] == pytest.approx(right.mean())
        assert point["macs"] == pytest.approx(1 - again.saving / 100)
        assert (unpack_hits(point["right"], 40) == right).all()
        assert point["same"] == pytest.approx((again.reduced == again.dense).double().mean())
    assert first["made"]["versions"]["torch"] == importlib.metadata.version("torch")
    swept = found["tiny-prune-v0-untrained-0"]["points"]
    assert 1 < len(swept) <= POINTS
    assert sum(not TINY.low <= point["macs"] <= TINY.high + 0.05 for point in swept) <= 2

    # Nothing runs again, and nothing changes.
    monkeypatch.setattr(suite_run, "_run_one", None)
    capsys.readouterr()
    assert run(f"run tiny-prune-v0 {learners}") == 0
    assert capsys.readouterr().out.count("(kept)") == 5 and kept() == found

    assert run("score suite --marl-eval scores.json") == 0
    text = capsys.readouterr().out
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
    rows = [row for row in rows if len(row) > 6]  # not those of the table of pairs
    scores = {row[1].strip(): row[5].strip() for row in rows}
    assert set(scores) == {"`random`", "`heuristic`", "`untrained`"}
    assert float(scores["`random`"].split()[0]) == pytest.approx(0, abs=5e-4)
    assert "[one seed]" in scores["`heuristic`"]
    assert "no interval with fewer than 2 seeds: heuristic" in text
    layout = json.loads(Path("scores.json").read_text())
    assert set(layout["tokenenv/TokenPrune-v0"]["tiny-prune-v0"]) == {"random", "untrained"}
    assert "left out, as not all seeds and tasks were run: heuristic" in text
    check_marl_eval(layout)

    assert run("plot suite --file picture.png") == 0
    with Image.open("picture.png") as image:
        assert min(image.size) > 400
        assert len(image.getcolors(2**20) or range(99)) > 20


def check_marl_eval(layout: dict[str, Any]) -> None:
    """The structure of marl-eval's README; by its own check where it is installed."""
    for algorithms in (one for game in layout.values() for one in game.values()):
        assert len({len(seeds) for seeds in algorithms.values()}) == 1
        for name, seeds in algorithms.items():
            assert "," not in name
            for steps in seeds.values():
                assert set(steps) == {"step_1", "absolute_metrics"}
                assert isinstance(steps["step_1"]["step_count"], int)
                for metric in (steps["step_1"]["return"], steps["absolute_metrics"]["return"]):
                    assert len(metric) == 1 and math.isfinite(metric[0])
    diagnose = pytest.importorskip("marl_eval.utils.diagnose_data_errors", exc_type=ImportError)
    for checks in diagnose.DiagnoseData(layout).check_data().values():
        assert all(checks.values())


def test_ctrl_c_keeps_what_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, turns = suite_run._run_one, iter(range(9))

    def pressed(*args: Any) -> Result:
        if next(turns) == 1:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(suite_run, "_run_one", pressed)
    assert run("run tiny-prune-v0 --learner random") == 130
    assert "results so far are kept; the same command goes on" in capsys.readouterr().err
    first = kept()
    assert list(first) == ["tiny-prune-v0-random-0"]
    assert run("run tiny-prune-v0 --learner random") == 0
    assert len(kept()) == 2 and kept()["tiny-prune-v0-random-0"] == first["tiny-prune-v0-random-0"]


def test_the_weights_are_hashed_once_for_all_learners(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    whole = suite_run.conditions
    monkeypatch.setattr(suite_run, "conditions", lambda *a: calls.append(a) or whole(*a))
    assert run("run tiny-prune-v0 --learner random --learner heuristic --seeds 0") == 0
    assert len(kept()) == 2 and len(calls) == 1


def test_results_under_other_conditions_are_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("run tiny-prune-v0 --learner heuristic") == 0
    path = Path("suite/results/tiny-prune-v0/tiny-prune-v0-heuristic-0.json")
    good = json.loads(path.read_text())
    del good["sha256"]  # a task of version 0 needs none, so that each check itself is reached
    again = "suite run tiny-prune-v0 --learner heuristic"
    for key, value in (("tokenenv", "0.0.1"), ("weights", "other"), ("task", {})):
        path.write_text(json.dumps({**good, "conditions": {**good["conditions"], key: value}}))
        assert f"was made with {key}=" in mistake(again, capfd)
    path.write_text(json.dumps({**good, "conditions": {**good["conditions"], "task": {}}}))
    assert "other settings of the task" in mistake("suite score suite", capfd)
    path.write_text(json.dumps({**good, "learner": "other"}))
    assert "holds learner 'other', not 'heuristic'" in mistake(again, capfd)
    path.write_text(json.dumps({**good, "task": "digits-prune-v9"}))
    assert "this one has 'digits-prune-v0'" in mistake("suite score suite", capfd)
    for broken in ("{", "[]", json.dumps({"task": TINY.name})):
        path.write_text(broken)
        assert "heuristic-0.json'" in mistake(again, capfd)
    changes: dict[str, list[Any]] = {
        "task": [[]], "learner": [5], "seed": [None, "x"], "classes": [0], "images": [0, 10**6],
        "points": [[], [{**good["points"][0], "top1": 5}], good["points"] * 6] + [
            [{**good["points"][0], "right": right}] for right in ("", "x" * 10, "ff " * 3 + "f")
        ],
        "dense": ["x" * 10, " " * 10, "FF" * 5],
    }  # fmt: skip
    for key, values in changes.items():
        for value in values:
            path.write_text(json.dumps({**good, key: value}))
            assert "heuristic-0.json' is no result" in mistake("suite score suite", capfd)
    path.write_text(json.dumps(good))
    path.with_name("copy.json").write_text(json.dumps(good))
    assert "two results of 'heuristic' seed 0" in mistake("suite score suite", capfd)
    path.with_name("copy.json").unlink()
    assert "need the learners random (seeds 0 to 1)" in mistake("suite score suite", capfd)


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_hits_survive(right: list[bool]) -> None:
    assert unpack_hits(hits(np.array(right)), len(right)).tolist() == right


def made(learner: str, seed: int, points: list[Point], **changed: Any) -> Result:
    conditions = {"task": TINY.settings(), "weights": "w", "images": 8, "files": "f"}
    conditions |= {"code": "", "learnt_in": "float32", "learnt_from": "l"}
    conditions |= {"tokenenv": "0"} | changed
    dense = hits(np.array([True] * 7 + [False]))
    return Result(TINY.name, learner, seed, conditions, 1.0, 10, 8, dense, tuple(points))


def plans() -> list[Result]:
    rng = np.random.default_rng(0)

    def point(macs: float) -> Point:
        right = rng.random(8) < macs + 0.2
        return Point(f"macs={macs}", macs, right.mean().item(), hits(right))

    random = [made("random", seed, [point(0.3), point(0.5)]) for seed in (0, 1)]
    return [*random, made("heuristic", 0, [point(0.27), point(0.4)])]


def test_scores_of_made_up_results() -> None:
    own = plans()
    yard = report.make_yardstick(TINY, own)
    oracle = [
        Point("o", cost, top1)
        for cost, top1 in zip(yard.oracle.cost.tolist(), yard.oracle.top1.tolist(), strict=True)
    ]
    found = report.make_report([*own, *(made("oracle", seed, oracle) for seed in (0, 1))])
    scores = {row.learner: row.scores for row in found.rows}
    assert np.mean(scores["random"]) == pytest.approx(0)
    assert scores["oracle"] == pytest.approx((1, 1))
    assert found.rows[-1].learner == "oracle"
    with pytest.raises(UserError, match="compare results of the same model and images"):
        report.make_report([*own, made("other", 0, oracle, weights="v")])
    several = report.make_report([*own, made("other", 0, oracle, tokenenv="1")])
    assert any("results of tokenenv 0, 1; this is" in note for note in several.notes)
    rows = [line for line in found.as_markdown().splitlines() if line.startswith("| `")]
    assert sum(line.count("|") > 5 for line in rows) == 3  # the other table is of pairs
    for how in ({"code": "b"}, {"learnt_in": "bfloat16"}, {"learnt_from": "others"}):
        two = [made("other", 0, oracle), made("other", 1, oracle, **how)]
        with pytest.raises(UserError, match=r"'other' seed 1 .* remove one of them and run it"):
            report.make_report([*own, *two])
        other = report.make_report([*own, two[1]])  # another learner's may differ
        halved = [note for note in other.notes if "learnt in bfloat16, measured" in note]
        assert bool(halved) == ("learnt_in" in how)


def test_marl_eval_gets_the_seeds_of_the_task() -> None:
    more = [dataclasses.replace(plans()[0], learner="eager", seed=seed) for seed in range(4)]
    late = [dataclasses.replace(plans()[0], learner="late", seed=seed) for seed in (2, 3)]
    layout, left_out = report.make_report([*plans(), *more, *late]).marl_eval()
    written = layout[TINY.environment][TINY.name]
    assert {name: list(runs) for name, runs in written.items()} == {
        name: ["seed_0", "seed_1"] for name in ("random", "eager")
    }
    assert left_out == ["heuristic", "late"]


def test_other_photographs_may_have_the_same_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenenv.suite.opened.load_backbone", lambda *_: load_backbone())
    task = dataclasses.replace(TINY, data="")
    for number, folder in enumerate(("train", "other", "part")):
        Path(folder, "3").mkdir(parents=True)
        for name in ("0.png", "1.png"):
            same = folder == "part" and name == "1.png"
            Image.new("L", (8, 8), 1 if same else number + 1).save(Path(folder, "3", name))
    opened = open_task(task, data="train", test_data="other")
    assert opened.test.files == opened.train.files
    for again in ("train", "part"):
        with pytest.raises(UserError, match="are among the training images"):
            open_task(task, data="train", test_data=again)


def test_saved_within_a_point() -> None:
    result = made("x", 0, [Point("a", 0.4, 0.75), Point("b", 0.6, 0.875)])
    assert result.saved() == pytest.approx(0.4)
    assert result.saved(lost=0.125) == pytest.approx(0.6)
    assert made("x", 0, [Point("a", 0.4, 0.5)]).saved() == 0


@pytest.mark.parametrize("steep", [0.5, 20.0, 3000.0])
def test_thresholds_are_spread_over_the_range(steep: float) -> None:
    looks = 0

    def look(odds: float) -> tuple[float, float]:
        nonlocal looks
        looks += 1
        cost = 0.2 + 0.9 / (1 + math.exp(min(steep * (odds - 1), 700)))
        return cost, cost**0.5

    found = spread(look, 0.3, 0.7)
    costs = [look(odds)[0] for odds in found]
    assert 1 <= len(found) <= POINTS and found == sorted(found)
    assert sum(cost < 0.3 for cost in costs) <= 1 and max(costs) <= 0.7
    assert looks <= 3 * POINTS + len(found)
    if steep < 100:  # else there is a jump, and nothing between
        assert len(found) == POINTS
        assert np.diff([0.7, *costs, 0.3]).min() > -0.15


def test_a_learner_that_only_jumps_shows_one_point() -> None:
    assert len(spread(lambda odds: (1.0 if odds < 0 else 0.2, 0.5), 0.3, 0.7)) == 1
    assert len(spread(lambda odds: (0.9, 0.5), 0.3, 0.7)) == 1


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_task_says_what_it_is(task: Task) -> None:
    assert 0 < task.low < task.high <= 1 and task.seeds >= 2
    assert 2 <= len(task.grid) <= POINTS
    for pattern in (task.random, task.heuristic):
        policies = [parse_policy(pattern.format(value), 12) for value in task.grid]
        assert all(not task.blocks or set(p.rules.blocks) <= set(task.blocks) for p in policies)
    system = "dora" if task.rules == "layer_merge" else "rl4evit"
    config = suite_learners.settings(task, system)
    assert config.updates * config.batch <= task.budget < (config.updates + 1) * config.batch
    # As words of the command line and back.
    words = {key: word(value) for key, value in vars(config).items()}
    assert with_settings(SYSTEMS[system].config(), words) == config
    if task.embedded:
        opened = open_task(task)
        game = opened.game(batch_size=1)
        with pytest.raises(UserError, match="has its own model, rules: leave it out"):
            opened.game(model="digits_vit", rules="token_prune")
        assert (game.agents, game.steps) == (
            task.agents if task.agents > 1 else opened.backbone.patches // 2,
            task.decisions,
        )
        assert task.random == task.random.strip() and len(opened.test) == task.test_images


def test_the_large_scenes_are_a_task_of_576_agents() -> None:
    opened = open_task(find_task("scenes-large-prune-v1"))
    envs = opened.make_vec(2, output="torch")
    seen, _ = envs.reset(seed=0)
    assert seen.shape[1] == opened.spec.agents == opened.backbone.patches == 576
    assert envs.max_cycles == opened.spec.decisions and opened.spec.blocks == (0, 1, 3)


def test_the_large_digits_keep_their_accuracy() -> None:
    backbone = load_backbone("digits_vit_16")
    source = open_source("digits", backbone.model, split="test", limit=200)
    assert backbone.patches == 256 and source.shape == (1, 16, 16)
    with torch.inference_mode():
        batch = source.batch(torch.arange(200))
        right = backbone(batch.images).argmax(1) == batch.labels
    assert right.float().mean() >= 0.98


def test_stable_baselines3_plays_the_merging_task() -> None:
    pytest.importorskip("stable_baselines3")
    assert run("run tiny-merge-v0 --learner sb3-ppo --seeds 0") == 0
    (found,) = kept(TINY_MERGE).values()
    assert [point["knob"] for point in found["points"]] == [
        f"penalty={p:g}" for p in PENALTIES["divergence"]
    ]


def test_photographs(real_data: Path) -> None:
    task = dataclasses.replace(find_task("deit-tiny-merge-v0"), test_images=4)
    weights = str(real_data / "weights" / "deit_tiny_patch16_224.safetensors")
    data, test_data = str(real_data / "imagenet_sample"), str(real_data / "imagenet_val_300")
    opened: OpenTask = open_task(task, weights=weights, data=data, test_data=test_data)
    assert len(opened.test) == 4 and opened.backbone.patches == 196
    with pytest.raises(UserError, match="are among the training images"):
        open_task(task, weights=weights, data=data, test_data=data)


@pytest.mark.skipif(not SHIPPED, reason="no references")
def test_the_references_are_scored(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("score") == 0
    text = capsys.readouterr().out
    layout, _ = report.make_report([]).marl_eval()
    assert len(layout) == len({task.environment for task in SHIPPED})
    check_marl_eval(layout)
    for task in SHIPPED:
        assert f"**{task.name}**" in text
        for result in references(task.name):
            assert result.conditions["task"] == task.settings()
            if result.learner in ("random", "heuristic"):  # else a gap would be measured
                assert min(point.macs for point in result.points) <= task.low
            assert f"{result.learner} (reference {result.version})" in text
        assert results.REFERENCE.joinpath(f"{task.name}.json").stat().st_size < 100_000
    assert run("plot --file all.png") == 0
