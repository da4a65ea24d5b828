"""``tokenenv compare``: its folder, going on after Ctrl-C, fine-tuned runs, mistakes."""

from __future__ import annotations

import csv
import itertools
import json
import shlex
import signal
import statistics
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from command_line import fail, mistake, write_digits
from PIL import Image
from safetensors.torch import load_file, save_file

from agents.policies.heuristics import MergeRandom
from agents.policies.words import parse_policy
from tokenenv.cli.main import main
from tokenenv.game.rules import LayerMerge
from tokenenv.measure import candidate
from tokenenv.measure import speed as bench
from tokenenv.measure.candidate import MethodCandidate
from tokenenv.vit.digits import WEIGHTS

FILES = {
    "table.md", "table.csv", "table.json", "table.tex", "classes.csv", "pareto.png", "report.html",
    "state",
}  # fmt: skip
SMALL = "compare 'tome:r=3|6' random-merge:r=5 {} --limit 30 --batch 1,5 --rounds 1"
WHATS = ["dense", "dense, exact", "tome:r=3", "tome:r=6", "random-merge:r=5"]


@pytest.fixture(autouse=True)
def _quick(elsewhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_SHORTEST", 0.0)


def compare(command: str, *more: str) -> dict[str, Any]:
    """The table that a command writes; ``more`` goes to its ``{}``."""
    arguments = shlex.split(command.format(" ".join(more)))
    assert main(arguments) == 0
    out = arguments[arguments.index("--out") + 1] if "--out" in arguments else "compare"
    return json.loads(Path(out, "table.json").read_text())


def untimed(table: dict[str, Any]) -> dict[str, Any]:
    rows = [{k: v for k, v in row.items() if k != "speeds"} for row in table["rows"]]
    return {**table, "rows": rows}


def test_the_folder_holds_what_evaluate_and_bench_say(capsys: pytest.CaptureFixture[str]) -> None:
    table = compare(SMALL, "tome:r=6")
    assert {path.name for path in Path("compare").iterdir()} == FILES
    assert [row["what"] for row in table["rows"]] == WHATS  # each once
    assert (table["model"], table["data"]) == ("digits_vit", "digits:test")
    out = capsys.readouterr().out
    dense, exact = table["rows"][:2]
    assert exact["speeds"] == [] and exact["saved"] > 0
    assert exact | {"what": "dense", "method": "dense"} == dense | {
        key: exact[key] for key in ("gmacs", "saved", "speeds", "pareto")
    }
    for row in (dense, *table["rows"][2:]):
        assert [speed["batch"] for speed in row["speeds"]] == [1, 5]
        assert row["images"] == 30 and row["frozen"]
        for speed in row["speeds"]:
            assert speed["speedup_q25"] <= speed["speedup"] <= speed["speedup_q75"]
        if row["what"] == "dense":
            continue
        assert main(["evaluate", row["what"], "--limit", "30", "--json", "r.json"]) == 0
        report = json.loads(Path("r.json").read_text())
        for name, same in (("top1", "top1"), ("gmacs", "gmacs_executed")):
            assert row[name] == pytest.approx(report[same])
        assert exact["gmacs"] == report["gmacs_dense_executed"]
        assert row["agreement"] == report["agreement"]
        assert row["divergence"] == pytest.approx(report["divergence"])
        assert row["lost"] == pytest.approx(report["top1_dense"] - report["top1"])
        assert row["saved"] == pytest.approx(100 * (1 - row["gmacs"] / report["gmacs_dense"]))
        assert f"{row['gmacs']:.4f}" in out
    with open("compare/table.csv", newline="") as file:
        assert [line["what"] for line in csv.DictReader(file)] == WHATS
    text = Path("compare/table.md").read_text()
    assert all(f"`{what}`" in text for what in WHATS)
    lines = Path("compare/table.tex").read_text().splitlines()
    assert [line.split(" & ")[0] for line in lines[5:10]] == WHATS
    assert all(line.endswith(r" \\") for line in lines[5:10])
    with open("compare/classes.csv", newline="") as file:
        classes = list(csv.DictReader(file))
    assert sum(int(each["images"]) for each in classes) == 30
    for row in (dense, *table["rows"][2:]):
        right = sum(int(each["images"]) * float(each[row["what"]]) for each in classes)
        assert right / 30 == pytest.approx(row["top1"], abs=1e-2)
    report = Path("compare/report.html").read_text()
    assert all(f'"what":"{what}"' in report for what in WHATS) and '"images":[]' in report
    with Image.open("compare/pareto.png") as image:
        assert min(image.size) > 300
        assert len(image.getcolors(2**20) or range(99)) > 20


def press_in_evaluation(monkeypatch: pytest.MonkeyPatch, number: int) -> list[Any]:
    """Press Ctrl-C in the ``number``-th evaluation; returns the policies evaluated."""
    evaluate, asked, calls = candidate.evaluate, [], itertools.count(1)

    def watched(backbone: Any, policy: Any, source: Any, **options: Any) -> Any:
        asked.append(policy)
        if next(calls) == number:
            signal.raise_signal(signal.SIGINT)
        return evaluate(backbone, policy, source, **options)

    monkeypatch.setattr(candidate, "evaluate", watched)
    return asked


def test_after_ctrl_c_the_same_command_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = compare(SMALL, "--out whole")
    asked = press_in_evaluation(monkeypatch, 2)
    assert main(shlex.split(SMALL.format(""))) == 130
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "tokenenv: interrupted; 1 of 3 rows are evaluated; the same command goes on"
    part = json.loads(Path("compare/table.json").read_text())
    assert [row["what"] for row in part["rows"]] == WHATS[:3]
    assert part["rows"][2]["speeds"] == [] and part["timing"] == ""
    assert {path.name for path in Path("compare").iterdir()} == FILES

    del asked[:]
    table = compare(SMALL)
    assert len(asked) == 2 and isinstance(asked[1], MergeRandom)
    assert untimed(table) == untimed(whole)

    monkeypatch.setattr(candidate, "evaluate", fail)
    monkeypatch.setattr("tokenenv.api.compare.bench", fail)
    before = {name: Path("compare", name).read_bytes() for name in FILES - {"state"}}
    again = compare(SMALL)
    assert again == table
    assert before == {name: Path("compare", name).read_bytes() for name in FILES - {"state"}}


def test_ctrl_c_while_timing_keeps_the_batch_sizes_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured, calls = bench.bench, itertools.count(1)

    def press(*args: Any, **options: Any) -> Any:
        if next(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return measured(*args, **options)

    monkeypatch.setattr("tokenenv.api.compare.bench", press)
    assert main(shlex.split(SMALL.format(""))) == 130
    assert "3 of 3 rows are evaluated" in capsys.readouterr().err
    part = json.loads(Path("compare/table.json").read_text())
    assert [s["batch"] for row in part["rows"] for s in row["speeds"]] == [1] * 4
    table = compare(SMALL)
    assert next(calls) == 4  # batch 5 alone
    for before, after in zip(part["rows"], table["rows"], strict=True):
        if after["what"] == "dense, exact":
            continue
        assert after["speeds"][:1] == before["speeds"] and len(after["speeds"]) == 2


def test_further_rows_are_timed_with_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    compare(SMALL)
    asked = press_in_evaluation(monkeypatch, 0)
    table = compare(SMALL, "keep-all")
    assert len(asked) == 1
    assert [len(row["speeds"]) for row in table["rows"]] == [2, 0, 2, 2, 2, 2]
    rows = json.loads(Path("compare/state/batch-5.json").read_text())["rows"]
    assert len(rows) == 5


def tuned_run(folder: Path) -> None:
    """A run that trained its backbone: one whose head says the opposite."""
    folder.mkdir()
    parse_policy("tome:r=4", 12).save(folder / "policy.safetensors")
    (folder / "config.json").write_text('{"model": "digits_vit", "weights": null}')
    (folder / "report.json").write_text('{"frozen": false}')
    state = load_file(WEIGHTS)
    save_file(state | {"head.weight": -state["head.weight"]}, folder / "model.safetensors")


def test_a_fine_tuned_run_plays_on_its_own_backbone(capsys: pytest.CaptureFixture[str]) -> None:
    tuned_run(Path("tuned"))
    tuned_run(Path("tome"))  # its name is taken: nobody asks for it
    table = compare("compare tuned tome:r=4 --limit 40 --batch 2 --rounds 1")
    dense, _, tuned, tome = table["rows"]
    assert (dense["frozen"], tuned["frozen"], tome["frozen"]) == (True, False, True)
    assert dense["top1"] > 90 and tome["top1"] > 90 and tuned["top1"] < 10
    assert tuned["agreement"] < 10 < 90 < tome["agreement"]
    assert tuned["gmacs"] == tome["gmacs"]
    assert "| `tuned` | fine-tuned |" in Path("compare/table.md").read_text()
    assert "fine-tuned" in capsys.readouterr().out

    # Trained on: evaluated anew, the other is not.
    save_file(load_file(WEIGHTS), "tuned/model.safetensors")
    again = compare("compare tuned tome:r=4 --limit 40 --batch 2 --rounds 1")
    assert again["rows"][2]["top1"] == tome["top1"]
    assert again["rows"][3]["top1"] == tome["top1"]


def test_the_sweep_of_a_runs_threshold() -> None:
    from agents.policies.actor import ActorPolicy, Widths
    from tokenenv.vit.load import load_backbone

    backbone, rules = load_backbone(), LayerMerge((1, 4), features=("similarity",))
    widths = Widths(rules.agent_dim(backbone), rules.shared_dim(backbone), 0)
    policy = ActorPolicy(rules, widths, trained_on="digits_vit")
    policy.lean_on(slice(0, 1), 1.0)
    Path("run").mkdir()
    policy.save(Path("run/policy.safetensors"))
    table = compare("compare 'run:threshold=0.2|0.5|0.9' --limit 20 --batch 2 --rounds 1")
    saved = [row["saved"] for row in table["rows"][2:]]
    assert saved == sorted(saved, reverse=True) and len(set(saved)) == 3
    assert list(table["hypervolume"]["percent"]) == ["run"]


def test_runs_of_several_seeds_are_summarised(capsys: pytest.CaptureFixture[str]) -> None:
    for seed, pairs in ((0, 2), (1, 3), (2, 7)):
        folder = Path(f"runs/dora-{seed}")
        folder.mkdir(parents=True)
        parse_policy(f"tome:r={pairs}", 12).save(folder / "policy.safetensors")
        config = {"model": "digits_vit", "weights": None, "seed": seed, "batch": 8}
        (folder / "config.json").write_text(json.dumps(config))
    command = "compare runs/dora-0 runs/dora-1 runs/dora-2 'random-merge:seed=1|2,r=5' tome:r=3"
    table = compare(f"{command} --limit 30 --batch 1 --rounds 1 --seeds")
    runs, random = table["seeds"]
    assert runs["what"] == "runs/dora" and runs["rows"] == [f"runs/dora-{i}" for i in range(3)]
    assert random["what"] == "random-merge:r=5" and len(random["rows"]) == 2
    saved = [row["saved"] for row in table["rows"][2:5]]
    mean, sd = sum(saved) / 3, statistics.stdev(saved)
    assert (runs["saved"]["mean"], runs["saved"]["sd"]) == pytest.approx((mean, sd))
    half = 4.302653 * sd / 3**0.5  # Student's t, 2 degrees of freedom
    assert runs["saved"]["high"] - mean == pytest.approx(half) == mean - runs["saved"]["low"]
    assert f"runs/dora, 3 seeds: top-1 {runs['top1']['mean']:.2f} +- " in capsys.readouterr().out
    assert "| `runs/dora` | 3 | " in Path("compare/table.md").read_text()


def test_other_settings_are_no_other_seed(capfd: pytest.CaptureFixture[str]) -> None:
    for seed in range(2):
        folder = Path(f"run-{seed}")
        folder.mkdir()
        parse_policy("tome:r=2", 12).save(folder / "policy.safetensors")
        config = {"model": "digits_vit", "weights": None, "seed": seed, "batch": 8 + seed}
        (folder / "config.json").write_text(json.dumps(config))
    error = mistake("compare run-0 run-1 tome:r=3 --limit 30 --seeds", capfd)
    assert "no two of the methods differ in their seed alone" in error


def test_unreadable_images_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    write_digits(Path("images"), 12)
    Path("images/3/bad.png").write_bytes(b"no picture")
    command = "compare 'tome:r=3|6' {} --data images --batch 2 --rounds 1"
    table = compare(command)
    assert [row["images"] for row in table["rows"]] == [12] * 4
    assert "skipped 1 unreadable images" in capsys.readouterr().out
    Path("images/3/bad.png").write_bytes(next(Path("images/1").iterdir()).read_bytes())
    assert main(shlex.split(command.format("tome:r=1"))) == 2
    assert "other images of 'images' can be read than in the rows before" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("--limit 20", "has images '30', not '20'"),
        ("--model test_vit --weights other.safetensors --data images", "has model 'digits_vit'"),
        ("--weights changed.safetensors", "has weights "),
        ("--data images", "has data 'digits:test', not 'images'"),
        ("--dtype bfloat16", "has dtype 'float32', not 'bfloat16'"),
    ],
)
def test_other_conditions_are_refused(
    change: str, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    compare("compare tome:r=3 --limit 30 --batch 1 --rounds 1")
    write_digits(Path("images"), 30)
    save_file(timm.create_model("test_vit", num_classes=10).state_dict(), "other.safetensors")
    state = load_file(WEIGHTS)
    save_file(state | {"head.bias": state["head.bias"] + 1e-3}, "changed.safetensors")
    error = mistake(f"compare tome:r=3 --limit 30 {change}", capfd)
    assert words in error and "a new --out" in error


def test_the_same_weights_from_another_file_will_do() -> None:
    command = "compare tome:r=3 --limit 30 --batch 1 --rounds 1"
    first = compare(command)
    save_file(load_file(WEIGHTS), "copy.safetensors")
    assert compare(f"{command} --weights copy.safetensors") == first


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("compare", "WHAT"),
        ("compare nonsense", "'nonsense' is neither a run folder nor a policy"),
        ("compare 'tome:r=3|x'", "'tome:r=x': r=x is not a number"),
        ("compare 'tome:r=3|'", "lacks a value"),
        ("compare keep-all 'norm:keep=0.5|1.5'", "1.5"),
        ("compare keep-all --batch 0", "'0' is no whole number"),
        ("compare keep-all --rounds 0", "'0' is no whole number"),
        ("compare keep-all --out something", "holds other files than a comparison's"),
        ("compare keep-all --out something/else.txt", "cannot write to 'something/else.txt'"),
        ("compare keep-all --out broken", "cannot read 'broken/state/conditions.json'"),
        ("compare keep-all --model vit_tiny_patch16_224", "needs --data"),
        ("compare rl4evit-deit_tiny --model digits_vit", "not on 'digits_vit'"),
        ("compare tuned", "'tuned/model.safetensors' is missing"),
        ("compare keep-all:threshold=0.5", "unknown argument 'threshold'"),
    ],
)
def test_mistakes(command: str, words: str, capfd: pytest.CaptureFixture[str]) -> None:
    Path("something").mkdir()
    Path("something/else.txt").write_text("mine")
    Path("broken/state").mkdir(parents=True)
    Path("broken/state/conditions.json").write_text("[]")
    tuned_run(Path("tuned"))
    Path("tuned/model.safetensors").unlink()
    assert words in mistake(command, capfd)


def test_backbones_of_their_own_on_the_clock() -> None:
    """A policy that brings a shorter model costs what that model costs."""
    from helpers import backbone

    from tokenenv.vit.backbone import Backbone

    short = Backbone(timm.create_model("digits_vit", depth=2))
    played_on = {"own": short, "shared": backbone()}
    candidates = [
        MethodCandidate(name, parse_policy("tome:r=3", 2), model)
        for name, model in played_on.items()
    ]
    dense, own, shared = bench.bench(backbone(), candidates, torch.randn(2, 1, 8, 8), rounds=1)
    assert own.gmacs < 0.5 * shared.gmacs < dense.gmacs
    assert own.gmacs_dense == shared.gmacs_dense == dense.gmacs


def test_published_costs_count_the_last_block_in_full() -> None:
    exact = compare(SMALL)
    published = compare(SMALL, "--published-cost")  # the same folder: nothing runs again
    assert [row["what"] for row in published["rows"]] == [w for w in WHATS if w != "dense, exact"]
    free = exact["rows"][1]["saved"]
    for one, other in zip(exact["rows"][2:], published["rows"][1:], strict=True):
        assert one["what"] == other["what"] and one["top1"] == other["top1"]
        assert other["saved"] < one["saved"] < other["saved"] + free
    assert "the last block in full" in Path("compare/table.md").read_text()
