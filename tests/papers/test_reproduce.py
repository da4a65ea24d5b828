"""A protocol from training to its table, on a few digits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import fail, mistake, write_digits

import tokenenv
from tokenenv.api import reproduce_model
from tokenenv.cli.main import main
from tokenenv.papers import PAPERS, Baseline, Claim, Paper, Study, Tier
from tokenenv.papers.protocol import IMAGENET, IMAGENET_A, IMAGENET_C
from tokenenv.papers.table import Reproduction

QUICK = {
    "updates": 1, "evaluate_every": 1, "batch": 8, "hidden": [8], "epochs": 1, "minibatches": 1,
    "calibrate": 2, "blocks": [1, 4],
}  # fmt: skip
TUNED = {"updates": 1, "evaluate_every": 1, "batch": 8, "held_back": 0.3}

PAPER = Paper(
    "tiny",
    "A tiny paper",
    "1 MAC = 2 FLOPs",
    "top1",
    (
        Study("Agent", "rl4evit"),
        Study("Agent, fine-tuned", "rl4evit-finetune", under="Agent"),
        Study("EViT", "evit", keep_of="random", part="baseline"),
        Study("Broken", "rl4evit", {"blocks": [99]}, "ablation"),
    ),
    (Baseline("ToMe", "tome:r={}", 0.0, 0.5, whole=True), Baseline("random", "random:keep={}"),
     Baseline("Nobody", "nobody:keep={}")),
    (
        Claim("dense", "deit_base_patch16_224", 81.8, 35.2, 3230),
        Claim("Agent", "deit_base_patch16_224", 80.8, 21.7, 3944),
        Claim("Absent", "deit_base_patch16_224", 80.8, 30.0, 3000),
        Claim("Agent", "deit_base_patch16_224", 26.7, data=IMAGENET_A),
    ),
    {
        "smoke": Tier(
            ("digits_vit",), seeds=2, images=60, limit=40, tries=10, rounds=1, batch=8,
            ablation_seeds=1,
            settings={
                "Agent": QUICK, "Broken": {**QUICK, "blocks": [99]}, "Agent, fine-tuned": TUNED,
                "EViT": TUNED,
            },
        )
    },
    ("A note.",),
)  # fmt: skip


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as ImageNet-A and as ImageNet-C."""
    root = tmp_path_factory.mktemp("sets")
    write_digits(root / "a", 30, only="0123")
    for severity in "13":
        write_digits(root / "c" / "fog" / severity, 20)
    return root


@pytest.fixture(scope="module")
def done(
    sets: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Reproduction, Path]]:
    out = tmp_path_factory.mktemp("reproduced") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PAPERS, "tiny", PAPER)
        yield tokenenv.reproduce("tiny", out=out, **folders(sets)), out


def folders(sets: Path) -> dict[str, Any]:
    return {"imagenet_a": sets / "a", "imagenet_c": sets / "c"}


def test_all_rows_are_there_and_those_that_failed_say_why(done: tuple[Reproduction, Path]) -> None:
    tables = {table.data: table for table in done[0].tables}
    assert list(tables) == [IMAGENET, IMAGENET_A, IMAGENET_C]
    lines = {(line.label, line.part): line for line in tables[IMAGENET].lines}
    assert list(lines) == [
        ("dense", "dense"), ("Agent", "paper"), ("Agent, fine-tuned", "paper"),
        ("Agent", "untrained"), ("EViT", "baseline"), ("ToMe", "baseline"),
        ("random", "baseline"), ("Nobody", "baseline"), ("Broken", "ablation"),
        ("Absent", "absent"),
    ]  # fmt: skip
    measured = {key for key, line in lines.items() if line.here is not None}
    assert set(lines) - measured == {
        ("Nobody", "baseline"), ("Broken", "ablation"), ("Absent", "absent"),
    }  # fmt: skip
    assert "nobody" in lines["Nobody", "baseline"].failure
    assert "Broken, seed 0: " in lines["Broken", "ablation"].failure
    assert len(done[0].failures) == 2
    for key in measured:
        assert not lines[key].failure
    agent, dense = lines["Agent", "paper"].here, lines["dense", "dense"].here
    assert agent is not None and dense is not None
    assert (agent.seeds, dense.seeds) == (2, 1) and agent.sd is not None
    assert agent.change.mean == pytest.approx(agent.top1 - dense.top1)
    assert agent.saved == pytest.approx(100 * (1 - agent.gmacs / dense.gmacs))
    assert agent.speedup and dense.speedup == 1.0


def test_the_papers_numbers_stand_beside_ours_marked_as_claims(
    done: tuple[Reproduction, Path],
) -> None:
    written = json.loads((done[1] / "table.json").read_text())
    lines = {(e["label"], e["part"]): e for e in written["tables"][0]["lines"]}
    assert lines["Agent", "paper"]["paper"]["gflops"] == 21.7
    assert lines["Agent", "paper"]["paper"]["change"] == pytest.approx(-1.0)
    assert lines["Agent", "untrained"]["paper"] is None
    assert lines["Absent", "absent"]["here"] is None
    assert "1 MAC = 2 FLOPs" in written["note"] and "1 MAC = 1 FLOP," in written["note"]
    text = (done[1] / "table.md").read_text()
    assert "paper's claim: top-1 %" in text and "deit_base_patch16_224" in text
    assert "| Absent (not run) |" in text and "A note." in text
    assert "| Broken | failed, see below |" in text and "- digits_vit, Broken: Broken" in text
    page = (done[1] / "report.html").read_text()
    assert "A tiny paper" in page and "Absent (not run)" in page


def test_corrupted_views_count_as_views_of_the_same_images(done: tuple[Reproduction, Path]) -> None:
    tables = {table.data: table for table in done[0].tables}
    assert "2 views of 20 images" in tables[IMAGENET_C].images
    views = next(line.here for line in tables[IMAGENET_C].lines if line.label == "ToMe")
    plain = next(line.here for line in tables[IMAGENET_A].lines if line.label == "ToMe")
    assert views is not None and plain is not None
    assert views.speedup is plain.speedup is None  # only the first set is timed


def test_a_second_call_does_nothing_again(
    done: tuple[Reproduction, Path], sets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for what failed, which is tried again."""
    before = done[0]
    trained: list[str] = []

    def train(system: str, **arguments: Any) -> Any:
        trained.append(system)
        return fail()

    monkeypatch.setattr(reproduce_model, "train", train)
    monkeypatch.setattr("tokenenv.measure.candidate.evaluate", fail)
    again = tokenenv.reproduce("tiny", out=done[1], **folders(sets))
    assert trained == ["rl4evit"]  # the broken one
    for old, new in zip(before.tables, again.tables, strict=True):
        assert [line.here for line in old.lines] == [line.here for line in new.lines]


def test_folders_and_models_that_do_not_go_together(
    done: tuple[Reproduction, Path], sets: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for command, words in (
        ("dora --out r --tier small", "tier small needs --imagenet"),
        ("dora --out r --models deit_tiny_patch16_224", "reads photographs: give --imagenet"),
        (f"dora --out r --imagenet {sets}", "holds no folder 'train'"),
        ("dora --out r --imagenet-a gone", "--imagenet-a 'gone' is no folder"),
        ("dora --out r --seeds 0", "'0' is no whole number from 1"),
        ("dore --out r", "invalid choice: 'dore'"),
        (f"dora --out {done[1]}", "with paper=dora: it was started with paper=tiny"),
    ):
        assert words in mistake(f"reproduce {command}", capfd)


def test_ctrl_c_keeps_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PAPERS, "rl4evit", PAPER)

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduce_model, "train", interrupt)
    assert main(["reproduce", "rl4evit", "--out", str(tmp_path / "r")]) == 130
    assert "interrupted" in capfd.readouterr().err
    assert not list((tmp_path / "r").glob("**/.lock"))


def test_baselines_are_matched_to_a_model_that_merges_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LTM has no policy, and its model is opened beside a dense one of another kind."""
    tier = Tier(
        ("digits_vit",), seeds=1, images=60, limit=20, rounds=1, batch=8, settings={"LTM": TUNED}
    )
    tome = Baseline("ToMe", "tome:r={}", 0.0, 0.5, whole=True)
    paper = Paper("own", "T", "F", "macs", (Study("LTM", "ltm"),), (tome,), (), {"smoke": tier})
    monkeypatch.setitem(PAPERS, "own", paper)
    (table,) = tokenenv.reproduce("own", out=tmp_path / "r").tables
    here = {line.label: line.here for line in table.lines}
    assert not any(line.failure for line in table.lines)
    assert here["LTM"] and here["ToMe"] and here["ToMe"].saved >= here["LTM"].saved
