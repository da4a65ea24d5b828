"""The command line: what it promises."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from command_line import QUICK, Failed, evaluation, fail, mistake, write_digits
from PIL import Image
from safetensors.torch import save_file

from agents.policies import shipped
from agents.systems.rl4evit import RL4EViTConfig
from agents.training import Run
from agents.training.rl import PolicyTraining
from agents.training.trainer import Trainer
from tokenenv.cli.main import main
from tokenenv.measure import candidate
from tokenenv.storage import read_tensors
from tokenenv.vit.digits import WEIGHTS, digits

pytestmark = pytest.mark.usefixtures("elsewhere")
KEYS = {
    "model", "data", "images", "skipped", "top1", "top1_dense", "agreement", "gmacs",
    "gmacs_dense", "tokens", "images_per_s", "images_per_s_dense", "dtype", "predictions",
    "preprocessing", "gmacs_executed", "gmacs_dense_executed", "divergence",
}  # fmt: skip


@pytest.mark.parametrize(
    "command", ["", "train", "evaluate", "bench", "compare", "compress", "envs"]
)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main([*command.split(), "--help"])
    assert exit.value.code == 0
    assert f"usage: tokenenv {command}".strip() in capsys.readouterr().out


def test_help_imports_no_model_library() -> None:
    code = (
        "import sys\nfrom tokenenv.cli.main import main\n"
        "names = 'train evaluate bench compare compress envs'.split()\n"
        "for words in ([], *([name] for name in names)):\n"
        "    try: main([*words, '--help'])\n"
        "    except SystemExit as exit: assert exit.code == 0\n"
        "loaded = {'torch', 'timm', 'torchvision', 'matplotlib', 'sklearn'} & sys.modules.keys()\n"
        "sys.exit(f'imported {loaded}' if loaded else 0)"
    )
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_version_and_envs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.startswith("tokenenv ")
    assert main(["envs"]) == 0
    assert "tokenenv/TokenPrune-v0" in capsys.readouterr().out


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = [sys.executable, "-m", "tokenenv", "train", "dora", "--list-settings"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout is not None
        run.stdout.close()
        assert run.stderr is not None
        assert (run.stderr.read(), run.wait()) == (b"", 141)


def test_settings_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "rl4evit", "--list-settings"]) == 0
    listed = capsys.readouterr().out
    assert "beta=" in listed
    assert f"hidden={'/'.join(map(str, RL4EViTConfig().hidden))}" in listed
    assert "price of a token" in listed


@pytest.mark.parametrize(
    ("system", "line", "meaning"),
    [
        (
            "dora",
            "features=similarity/cls_attention/size/token",
            "probability of merging before training",
        ),
        ("dora-prune", "budget_step=2", "spacing of the budgets"),
    ],
)
def test_doras_settings_are_listed(
    system: str, line: str, meaning: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", system, "--list-settings"]) == 0
    listed = capsys.readouterr().out
    for words in (line, meaning, "price of damage before"):
        assert words in listed
    embedded = "digits_vit and digits_vit_16 and scenes_vit and scenes_vit_patch2"
    assert f"  batch=64  ({embedded}: 128)\n" in listed
    assert "  updates=240  (digits_vit and scenes_vit and scenes_vit_patch2: " in listed
    assert "; digits_vit_16: 40)\n" in listed
    assert (
        "  blocks=  (digits_vit and scenes_vit and scenes_vit_patch2: empty; digits_vit_16: 0/"
        in listed
    ) == (system == "dora")
    assert not Path("runs").exists()


def test_a_run_folder_holds_what_is_promised(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    assert len(events) == 1
    assert names - events == {
        "config.json", "policy.safetensors", "report.json", "curve.png", "tokens.png",
        "before_after.gif", "checkpoint.safetensors", "untrained",
    }  # fmt: skip
    with Image.open(run / "before_after.gif") as image:
        assert image.n_frames == 3 * (2 + 1)  # images; decisions, and the frame before them
    for name in ("curve.png", "tokens.png"):
        with Image.open(run / name) as image:
            assert min(image.size) > 300
            assert len(image.getcolors(2**20) or range(99)) > 20  # not a blank sheet
    config = json.loads((run / "config.json").read_text())
    assert (config["model"], config["updates"], config["seed"]) == ("digits_vit", 3, 0)
    assert config["blocks"] == [1, 4]
    report = json.loads((run / "report.json").read_text())
    assert report["data"] == "digits:test"
    assert report["images"] == 600
    assert report["updates"] == 3
    assert not report["stopped_early"]
    assert len([row for row in report["history"] if "saving" in row]) == 4


@pytest.mark.parametrize("system", ["dora", "dora-prune"])
def test_a_dora_run_holds_what_is_promised_and_evaluates_to_its_report(
    system: str, capfd: pytest.CaptureFixture[str]
) -> None:
    command = (
        f"train {system} --images 60 --set updates=2 --set evaluate_every=1 --set batch=8 "
        "--set epochs=1 --set minibatches=1 --set calibrate=2 --set blocks=1/4 --out r"
    )
    assert main(command.split()) == 0
    names = {path.name for path in Path("r").iterdir()}
    assert {name for name in names if not name.startswith("events.out.tfevents")} == {
        "config.json", "policy.safetensors", "report.json", "curve.png", "tokens.png",
        "before_after.gif", "checkpoint.safetensors", "untrained",
    }  # fmt: skip
    config, report = (json.loads(Path("r", n).read_text()) for n in ("config.json", "report.json"))
    assert (config["system"], config["model"], config["blocks"]) == (system, "digits_vit", [1, 4])
    assert (report["updates"], report["images"]) == (2, 600)
    assert len([row for row in report["history"] if "saving" in row]) == 3
    for name in ("curve.png", "tokens.png"):
        with Image.open(Path("r", name)) as image:
            assert len(image.getcolors(2**20) or range(99)) > 20  # not a blank sheet
    found = evaluation("r")
    for key in KEYS - {"dtype", "predictions", "images_per_s", "images_per_s_dense"}:
        assert found[key] == report[key], key
    # Tokens leave between the attention and the MLP of the two blocks, nowhere else.
    tokens = found["tokens"]
    assert tokens[0] == 64 and len(set(tokens[1:4])) == len(set(tokens[4:])) == 1
    assert tokens[4] <= tokens[1] <= 64

    model = timm.create_model("test_vit", num_classes=10)
    save_file(model.state_dict(), "other.safetensors")
    write_digits(Path("images"), 12)
    other = "--data images --model test_vit --weights other.safetensors"
    assert "'digits_vit', not on 'test_vit'" in mistake(f"evaluate r {other}", capfd)
    error = mistake(f"{command} --resume --set penalty=2", capfd)
    assert "penalty=2.0: it was started with penalty=1" in error


@pytest.mark.parametrize(
    ("what", "tokens"),
    [
        ("tome:r=8", [56, 48, 40, 32, 24, 16, 8, 4, 2, 1, 1, 1]),  # half at most
        ("tome:r=3,blocks=0/5", [61] * 5 + [58] * 7),
        ("tome:r=0", [64] * 12),
        ("random-merge:r=8,seed=2,blocks=3", [64] * 3 + [56] * 9),
        ("random-merge:r=8", [56, 48, 40, 32, 24, 16, 8, 4, 2, 1, 1, 1]),
        ("merge-above:similarity=1,blocks=0/1", [64] * 12),
        ("merge-above:similarity=-1,blocks=0/1", [32, *[16] * 11]),
    ],
)
def test_merging_heuristics(what: str, tokens: list[int]) -> None:
    """``n`` tokens after the block's attention: its MLP and all that follows run on them."""
    report = evaluation(f"{what} --limit 40 --batch 16")
    assert report.keys() == KEYS
    assert report["tokens"] == tokens
    due = what.partition("blocks=")[2]
    blocks = [int(b) for b in due.split("/")] if due else range(12)
    macs = 64 * 48 * 9 + 48 * 10.0
    for block, (before, after) in enumerate(zip([64, *tokens], tokens, strict=False)):
        n = before + 1
        macs += 4 * n * 48**2 + 2 * n**2 * 48 + 8 * (after + 1) * 48**2
        if block in blocks:  # the matching, on keys of width 16
            macs += -(-before // 2) * (before // 2) * HEAD
    assert report["gmacs"] * 1e9 == pytest.approx(macs, rel=1e-9)
    if tokens[-1] == 64:
        assert report["agreement"] == 100


HEAD = timm.create_model("digits_vit").blocks[0].attn.head_dim


@pytest.mark.parametrize(
    ("what", "tokens"),
    [
        ("evit:keep=0.5,blocks=3/6", [64] * 3 + [33] * 3 + [18] * 6),  # the half and what fused
        ("evit:keep=0.5,blocks=3/6,fuse=0", [64] * 3 + [32] * 3 + [16] * 6),
        ("zerotprune:keep=0.5,blocks=3/6", [64] * 3 + [32] * 3 + [16] * 6),
        ("pitome:keep=0.9,blocks=0/11", [58] * 11 + [53]),
        ("diffrate:prune=4/0/30,merge=5/20/9,blocks=0/1/2", [55, 35, *[1] * 10]),
        ("tome:r=20,schedule=decreasing,blocks=0/1/2", [32, 16, *[16] * 10]),
        ("resize:size=6", [36] * 12),
    ],
)
def test_published_methods(what: str, tokens: list[int]) -> None:
    report = evaluation(f"{what} --limit 20 --batch 8")
    assert report["tokens"] == tokens
    assert report["gmacs"] < report["gmacs_dense"] == pytest.approx(0.02646, rel=1e-3)


def test_merging_above_a_similarity_follows_the_image() -> None:
    few, many = (evaluation(f"merge-above:similarity={s} --limit 40")["tokens"] for s in (0.9, 0.7))
    for tokens in (few, many):
        assert all(a >= b for a, b in itertools.pairwise(tokens))
    assert 64 > few[-1] > many[-1] >= 1
    assert few[-1] != round(few[-1])  # a mean of images that differ


def test_a_share_is_held_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Trainer, "run", fail)
    with pytest.raises(Failed):
        main([*QUICK.split(), "--set", "held_back=0.2"])
    assert "48 images of digits:train, 12 held back" in capsys.readouterr().out


def test_runs_without_a_name_are_numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agents.training.rl.PolicyTraining.run", touch)
    for number in range(3):
        assert main(["train", "rl4evit"]) == 0
        assert Path(f"runs/rl4evit-{number}/file").exists()


def touch(training: PolicyTraining) -> Run:
    (training.out / "file").touch()
    return Run(training.out)


def test_both_embedded_models_bring_their_images_along() -> None:
    for model in ("digits_vit", "digits_vit_16"):
        found = evaluation(f"keep-all --model {model} --limit 20")
        assert (found["data"], found["images"]) == ("digits:test", 20)


def test_a_run_evaluates_to_its_own_report(run: Path) -> None:
    found, report = (
        evaluation(str(run)),
        json.loads((run / "report.json").read_text()),
    )
    for key in KEYS - {"dtype", "predictions", "images_per_s", "images_per_s_dense"}:
        assert found[key] == report[key], key


def dense_macs(tokens: list[float]) -> float:
    """By hand: digits_vit's embedding, blocks on one token more, and head."""
    blocks = sum(12 * (n + 1) * 48**2 + 2 * (n + 1) ** 2 * 48 for n in tokens)
    return 64 * 48 * 9 + blocks + 48 * 10


def test_keep_all_is_the_dense_model() -> None:
    report = evaluation("keep-all --limit 50")
    assert report.keys() == KEYS
    assert (report["model"], report["data"]) == ("digits_vit", "digits:test")
    assert (report["images"], report["skipped"]) == (50, 0)
    assert report["agreement"] == 100
    assert report["top1"] == report["top1_dense"] >= 90
    assert report["gmacs"] == report["gmacs_dense"]
    assert report["gmacs_dense"] * 1e9 == pytest.approx(dense_macs([64] * 12))
    assert report["tokens"] == [64] * 12
    assert report["images_per_s"] > 0
    assert report["images_per_s_dense"] > 0


@pytest.mark.parametrize(
    ("what", "tokens"),
    [
        ("random:keep=0.5", [64] * 3 + [32] * 3 + [16] * 3 + [8] * 3),
        ("random:keep=0.5,seed=3,blocks=0", [32] * 12),
        ("norm:keep=0.7", [64] * 3 + [45] * 3 + [32] * 3 + [23] * 3),
        ("cls-attention:keep=0.25,blocks=2/11", [64] * 2 + [16] * 9 + [4]),
        ("cls-attention:keep=1", [64] * 12),
    ],
)
def test_heuristics(what: str, tokens: list[int]) -> None:
    report = evaluation(f"{what} --limit 40 --batch 16")
    assert report.keys() == KEYS
    assert report["tokens"] == tokens
    observing = 65 * 48 if what.startswith("cls-attention") else 0
    assert report["gmacs"] * 1e9 == pytest.approx(dense_macs(tokens), rel=1e-9, abs=3 * observing)


def test_numbers_follow_from_the_predictions(run: Path) -> None:
    report = evaluation(f"{run} --limit 100")
    rows = report["predictions"]
    assert len(rows) == report["images"] == 100
    assert all(row.keys() == {"file", "label", "dense", "reduced"} for row in rows)
    assert len({row["file"] for row in rows}) == 100

    def share(one: str, other: str) -> float:
        return 100 * sum(row[one] == row[other] for row in rows) / len(rows)

    assert report["top1"] == share("reduced", "label")
    assert report["top1_dense"] == share("dense", "label")
    assert report["agreement"] == share("reduced", "dense")
    labels = digits("test")[1]
    for row in rows:
        assert row["label"] == labels[int(row["file"].split("/")[-1])]


def test_the_table_says_what_the_json_says(capsys: pytest.CaptureFixture[str]) -> None:
    report = evaluation("norm:keep=0.7 --limit 30")
    out = capsys.readouterr().out
    assert f"{report['top1']:.2f}" in out
    assert f"{report['gmacs']:.4f}" in out
    assert "fewer MACs" in out
    assert "r.json" in out


@pytest.mark.parametrize("name", shipped() or [pytest.param("", marks=pytest.mark.skip("none"))])
def test_shipped_policies_are_known_by_name(name: str) -> None:
    if read_tensors_of(name)["trained_on"] != "digits_vit":
        pytest.skip("needs images of its own")
    assert evaluation(f"{name} --limit 20")["images"] == 20


def read_tensors_of(name: str) -> dict[str, Any]:
    from agents.policies import SHIPPED

    return read_tensors(SHIPPED / name / "policy.safetensors")[1]


def test_restrict_predicts_among_the_classes_of_the_data() -> None:
    write_digits(Path("right"), 20, only="78")
    Path("wrong").mkdir()
    for true, called in (("7", "0"), ("8", "1")):
        Path("right", true).rename(Path("wrong", called))
    free = evaluation("norm:keep=0.9 --data wrong")["predictions"]
    bound = evaluation("norm:keep=0.9 --data wrong --restrict")["predictions"]
    assert {row["dense"] for row in free} & {7, 8}
    assert {row[key] for row in bound for key in ("dense", "reduced")} <= {0, 1}


def test_weights_of_ones_own(untrained: Path) -> None:
    assert evaluation(f"keep-all --weights {untrained} --limit 50")["top1"] < 50


def test_a_run_remembers_its_weights(untrained: Path) -> None:
    command = f"{QUICK} --set updates=1 --weights {os.path.relpath(untrained)} --out r"
    assert main(shlex.split(command)) == 0
    assert evaluation("r --limit 50")["top1_dense"] < 50


def test_a_pth_state_dict_will_do() -> None:
    from safetensors.torch import load_file

    torch.save({"state_dict": load_file(WEIGHTS)}, "digits.pth")
    assert evaluation("keep-all --weights digits.pth --limit 50")["top1"] >= 90


def test_a_ctrl_c_in_an_evaluation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def press(*args: Any, **kwargs: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(candidate, "evaluate", press)
    assert main(["evaluate", "keep-all", "--json", "new/r.json"]) == 130
    assert capsys.readouterr().err == "tokenenv: interrupted\n"
    assert not Path("new").exists()


def test_a_programming_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidate, "evaluate", fail)
    with pytest.raises(Failed):
        main(["evaluate", "keep-all"])


# Real weights and images


def test_keep_all_on_real_images(real_data: Path) -> None:
    report = evaluation(
        "keep-all --model deit_tiny_patch16_224 --limit 32 --batch 16 "
        f"--weights {real_data / 'weights/deit_tiny_patch16_224.safetensors'} "
        f"--data {real_data / 'imagenet_val_300'}"
    )
    assert (report["images"], report["skipped"]) == (32, 0)
    assert report["agreement"] == 100
    assert report["top1"] == report["top1_dense"] > 60
    assert report["tokens"] == [196] * 12
    assert report["gmacs"] == report["gmacs_dense"] == pytest.approx(1.254, abs=0.01)
    assert all(row["file"].startswith("n") for row in report["predictions"])
