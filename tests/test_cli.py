"""The command line: what it promises, and one line for every mistake."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shlex
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from agents.mappo import MAPPO
from agents.policy import shipped
from agents.rl4evit import RL4EViTConfig
from agents.storage import read_tensors
from agents.training import CHECKPOINT, Trainer
from tokenenv import metrics
from tokenenv.cli import main
from tokenenv.commands import common
from tokenenv.embedded import WEIGHTS, digits

QUICK = (
    "train rl4evit --images 60 --set updates=3 --set evaluate_every=1 --set batch=8 "
    "--set hidden=8 --set epochs=1 --set minibatches=1 --set calibrate=2 --set blocks=1/4"
)
KEYS = {
    "model", "data", "images", "skipped", "top1", "top1_dense", "agreement", "gmacs",
    "gmacs_dense", "tokens", "images_per_s", "images_per_s_dense", "predictions",
}  # fmt: skip


class Failed(Exception):
    """For what must not be called, or goes wrong on purpose."""


def fail(*args: Any, **kwargs: Any) -> Any:
    raise Failed


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has a current folder of its own."""
    monkeypatch.chdir(tmp_path)


def write_digits(root: Path, count: int, only: str = "0123456789") -> None:
    """``count`` test digits as ``root/DIGIT/NUMBER.png``."""
    images, labels = digits("test")
    wanted = [i for i, label in enumerate(labels.tolist()) if str(label) in only]
    for i in wanted[:count]:
        folder = root / str(int(labels[i]))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i, 0].numpy()).save(folder / f"{i}.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 digits as a folder of images."""
    root = tmp_path_factory.mktemp("images") / "digits"
    write_digits(root, 40)
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short training run."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main([*QUICK.split(), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of digits_vit that know nothing."""
    path = tmp_path_factory.mktemp("weights") / "untrained.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(timm.create_model("digits_vit").state_dict(), path)
    return path


def evaluation(command: str) -> dict[str, Any]:
    """What ``tokenenv evaluate COMMAND`` writes."""
    assert main(["evaluate", *shlex.split(command), "--json", "r.json"]) == 0
    return json.loads(Path("r.json").read_text())


def tree(root: Path) -> dict[str, bytes | None]:
    """All files and folders below ``root``."""
    return {
        str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in root.rglob("*")
    }


def mistake(command: str, capfd: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr that ``command`` ends in, having changed no file."""
    before = tree(Path.cwd())
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as warned:  # each would be more lines
        warnings.simplefilter("always", UserWarning)
        try:
            status = main(shlex.split(command))
        except SystemExit as exit:
            status = exit.code
    error = capfd.readouterr().err
    assert status == 2, error
    assert not [str(w.message) for w in warned if issubclass(w.category, UserWarning)]
    assert error.count("\n") == 1, error
    assert error.startswith("tokenenv")
    assert tree(Path.cwd()) == before
    return error


# What works


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
        "import sys\nfrom tokenenv.cli import main\n"
        "names = 'train evaluate bench compare compress envs'.split()\n"
        "for words in ([], *([name] for name in names)):\n"
        "    try: main([*words, '--help'])\n"
        "    except SystemExit as exit: assert exit.code == 0\n"
        "loaded = {'torch', 'timm', 'torchvision', 'matplotlib', 'sklearn'} & sys.modules.keys()\n"
        "sys.exit(f'imported {loaded}' if loaded else 0)"
    )
    root = str(Path(__file__).resolve().parents[1])
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
    for words in (line, "updates=240  (embedded model: ", meaning, "price of damage before"):
        assert words in listed
    assert not Path("runs").exists()


def test_a_run_folder_holds_what_is_promised(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    assert len(events) == 1
    assert names - events == {
        "config.json", "policy.safetensors", "report.json", "curve.png", "tokens.png",
        "checkpoint.safetensors",
    }  # fmt: skip
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
        "checkpoint.safetensors",
    }  # fmt: skip
    config, report = (json.loads(Path("r", n).read_text()) for n in ("config.json", "report.json"))
    assert (config["system"], config["model"], config["blocks"]) == (system, "digits_vit", [1, 4])
    assert (report["updates"], report["images"]) == (2, 600)
    assert len([row for row in report["history"] if "saving" in row]) == 3
    for name in ("curve.png", "tokens.png"):
        with Image.open(Path("r", name)) as image:
            assert len(image.getcolors(2**20) or range(99)) > 20  # not a blank sheet
    found = evaluation("r")
    for key in KEYS - {"predictions", "images_per_s", "images_per_s_dense"}:
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
    monkeypatch.setattr("tokenenv.commands.train._train", lambda args, run, out: touch(out))
    for number in range(3):
        assert main(["train", "rl4evit"]) == 0
        assert Path(f"runs/rl4evit-{number}/file").exists()


def touch(out: Path) -> None:
    (out / "file").touch()


def test_a_run_evaluates_to_its_own_report(run: Path) -> None:
    found, report = (
        evaluation(str(run)),
        json.loads((run / "report.json").read_text()),
    )
    for key in KEYS - {"predictions", "images_per_s", "images_per_s_dense"}:
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
    from agents.policy import SHIPPED

    return read_tensors(SHIPPED / name / "policy.safetensors")[1]


def test_a_folder_is_evaluated_by_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = evaluation(f"keep-all --data {folder}")
    assert (report["data"], report["images"]) == ("digits", 40)
    assert report["top1"] >= 90
    for row in report["predictions"]:
        assert (folder / row["file"]).is_file()
        assert row["file"].startswith(f"{row['label']}/")


def test_limit_takes_at_most_so_many(folder: Path) -> None:
    assert evaluation(f"keep-all --data {folder} --limit 15")["images"] == 15
    assert evaluation(f"keep-all --data {folder} --limit 5000")["images"] == 40


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


def test_unreadable_images_are_skipped_and_counted(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_digits(Path("images"), 40)
    Path("images/3/bad.png").write_bytes(b"no picture")
    Path("images/4/worse.png").write_bytes(b"")
    report = evaluation("keep-all --data images")
    assert (report["images"], report["skipped"]) == (40, 2)
    assert not [row for row in report["predictions"] if "bad" in row["file"]]
    assert (
        "skipped 2 unreadable images of images, for example '3/bad.png'" in capfd.readouterr().out
    )

    command = QUICK.replace("--images 60", "--data images --set batch=4")
    assert main([*command.split(), "--out", "r"]) == 0
    assert "skipped 2 unreadable images" in capfd.readouterr().out
    assert json.loads(Path("r/report.json").read_text())["images"] > 0


def test_a_first_ctrl_c_keeps_everything(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [*QUICK.replace("--images 60", f"--data {folder}").split(), "--out", "r"]
    interrupt_update(monkeypatch, number=2, times=1)
    assert main(command) == 130
    report = json.loads(Path("r/report.json").read_text())
    assert (report["updates"], report["stopped_early"]) == (2, True)
    for name in ("policy.safetensors", "config.json", "curve.png", "tokens.png", CHECKPOINT):
        assert Path("r", name).is_file()
    assert evaluation("r --limit 10")["images"] == 10

    assert main([*command, "--resume"]) == 0
    report = json.loads(Path("r/report.json").read_text())
    assert (report["updates"], report["stopped_early"]) == (3, False)
    assert report["evaluated_on_held_back"]


def test_a_second_ctrl_c_ends_it_and_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_update(monkeypatch, number=2, times=2)
    assert main([*QUICK.split(), "--out", "r"]) == 130
    assert not Path("r/report.json").exists()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "tokenenv: interrupted; the same command with --out r --resume goes on"
    assert read_tensors(Path("r", CHECKPOINT))[1]["done"] == 1


def interrupt_update(monkeypatch: pytest.MonkeyPatch, number: int, times: int) -> None:
    """Press Ctrl-C in the ``number``-th update from now on."""
    update, calls = MAPPO.update, iter(range(1, 99))

    def interrupted(self: MAPPO) -> dict[str, float]:
        if next(calls) == number:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return update(self)

    monkeypatch.setattr(MAPPO, "update", interrupted)


def test_a_ctrl_c_in_an_evaluation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def press(*args: Any, **kwargs: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(metrics, "evaluate", press)
    assert main(["evaluate", "keep-all", "--json", "new/r.json"]) == 130
    assert capsys.readouterr().err == "tokenenv: interrupted\n"
    assert not Path("new").exists()


def test_a_programming_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "evaluate", fail)
    with pytest.raises(Failed):
        main(["evaluate", "keep-all"])


# What doesn't


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("", "COMMAND"),
        ("trian", "trian"),
        ("train rlevit", "rlevit|dora-prune"),
        ("train rl4evit --images 0", "'0' is no whole number from 1"),
        ("train rl4evit --images x", "'x' is no whole number"),
        ("train rl4evit --seed -1", "'-1' is no whole number from 0"),
        ("train rl4evit --seed 1e3", "'1e3' is no whole number from 0"),
        ("train rl4evit --nonsense", "--nonsense"),
        ("evaluate", "WHAT"),
        ("evaluate keep-all --limit -5", "'-5' is no whole number from 1"),
        ("evaluate keep-all --batch 0", "'0' is no whole number from 1"),
        # models and weights
        ("evaluate keep-all --model digit_vit", "digit_vit|did you mean 'digits_vit'"),
        ("train rl4evit --model nonsense --data .", "unknown model 'nonsense'"),
        ("evaluate keep-all --model nonsense", "unknown model 'nonsense'"),
        ("evaluate keep-all --model vit_tiny_patch16_224.zz --data .", "vit_tiny_patch16_224.zz"),
        (
            "evaluate keep-all --data . --model swin_tiny_patch4_window7_224",
            "swin_tiny_patch4_window7_224|VisionTransformer family",
        ),
        ("train rl4evit --model swin_tiny_patch4_window7_224", "VisionTransformer family"),
        ("evaluate keep-all --model test_vit", "'test_vit' needs --data"),
        ("evaluate keep-all --weights gone.pth", "'gone.pth' does not exist|--weights"),
        ("train rl4evit --weights gone.safetensors", "'gone.safetensors' does not exist"),
        ("evaluate keep-all --device nonsense", "'nonsense'|--device cpu"),
        ("train rl4evit --device nonsense", "'nonsense'|--device cpu"),
        # data
        ("evaluate keep-all --data gone", "'gone' is neither a folder"),
        ("train rl4evit --data gone", "'gone' is neither a folder"),
        ("train rl4evit --images 1198", "--images 1198|1197 images"),
        # policies
        ("evaluate nonsense", "'nonsense' is neither a run folder nor a policy|keep-all"),
        ("evaluate random", "keep=0.7"),
        ("evaluate random:keep", "key=value"),
        ("evaluate random:keep=0", "keep ratio 0 is outside"),
        ("evaluate random:keep=-1", "keep ratio -1 is outside"),
        ("evaluate norm:keep=1.5", "keep ratio 1.5 is outside"),
        ("evaluate cls-attention:keep=nan", "keep ratio nan is outside"),
        ("evaluate norm:keep=much", "keep=much is not a number"),
        ("evaluate norm:kep=0.5", "needs keep"),
        ("evaluate norm:keep=0.5,seed=1", "unknown argument 'seed'"),
        ("evaluate random:keep=0.5,seed=1.5", "seed=1.5"),
        ("evaluate random:keep=0.5,seed=inf", "seed=inf"),
        ("evaluate keep-all:blocks=12", "block 12 is out of range|0 to 11"),
        ("evaluate keep-all:blocks=-1", "blocks=-1"),
        ("evaluate norm:keep=0.5,blocks=3/3", "blocks=3/3 must be strictly increasing"),
        ("evaluate norm:keep=0.5,blocks=6/3", "blocks=6/3"),
        ("evaluate norm:keep=0.5,blocks=three", "blocks=three must be block indices"),
        ("evaluate cls-attention:keep=0.5,blocks=0/3", "none before block 0"),
        ("evaluate tome", "needs r=|tome:r=8"),
        ("evaluate tome:r=-1", "r=-1 pairs to merge: give 0 or more"),
        ("evaluate tome:r=1.5", "r=1.5 is not a whole number"),
        ("evaluate tome:r=inf", "r=inf is not a whole number"),
        ("evaluate tome:r=nan", "r=nan is not a whole number"),
        ("evaluate random-merge:r=1e19", "r=1e+19 is not a whole number"),
        ("evaluate tome:r=much", "r=much is not a number"),
        ("evaluate tome:r=4,seed=1", "unknown argument 'seed'"),
        ("evaluate tome:r=4,blocks=0/12", "block 12 is out of range|0 to 11"),
        ("evaluate random-merge:r=2,seed=-1", "seed=-1"),
        ("evaluate random-merge:k=2", "needs r="),
        ("evaluate merge-above", "needs similarity="),
        ("evaluate merge-above:similarity=2", "similarity 2 is no cosine"),
        ("evaluate merge-above:similarity=nan", "similarity nan is no cosine"),
        # settings
        ("train rl4evit --set beta", "--set beta|key=value"),
        ("train rl4evit --set bta=1", "--set bta=1: unknown key; choose from|beta"),
        ("train rl4evit --set beta=much", "beta=much|takes a number"),
        ("train rl4evit --set updates=1.5", "updates=1.5|a whole number"),
        ("train rl4evit --set share=maybe", "share=maybe|true or false"),
        ("train rl4evit --set reward=gold", "reward=gold|cooperative or alpha_beta"),
        ("train rl4evit --set hidden=a/b", "hidden=a/b|a list of a whole number"),
        ("train rl4evit --set beta=nan", "beta=nan|a finite number"),
        ("train rl4evit --set alpha=inf", "alpha=inf|a finite number"),
        ("train rl4evit --set lr=0", "lr=0.0|greater than 0"),
        ("train rl4evit --set updates=0", "updates=0|at least 1"),
        ("train rl4evit --set evaluate_every=0", "evaluate_every=0|at least 1"),
        ("train rl4evit --set gamma=1.1", "gamma=1.1|from 0 to 1"),
        ("train rl4evit --set held_back=1", "held_back=1.0|between 0 and 1"),
        ("train rl4evit --set held_back=0", "held_back=0.0|between 0 and 1"),
        ("train rl4evit --images 20 --set held_back=0.01", "0.01 of the 20 images"),
        ("train rl4evit --set initial_keep=1", "initial_keep=1.0|between 0 and 1"),
        ("train rl4evit --set hidden=", "hidden=|one or more widths"),
        ("train rl4evit --set hidden=0", "hidden=0|one or more widths"),
        ("train rl4evit --set features=", "features=|one or more names"),
        ("train rl4evit --set features=smell", "unknown feature 'smell'"),
        ("train rl4evit --set blocks=3/3", "blocks=3/3"),
        ("train rl4evit --set blocks=40", "block 40 is out of range"),
        ("train rl4evit --set blocks=x", "blocks=x|a list of a whole number"),
        ("train rl4evit --set batch=5000", "batch=5000|--set batch="),
        ("train rl4evit --set batch=10 --set repeats=4", "10|multiple of repeats=4"),
        ("train rl4evit --set reward=keep_target --set targets=0/0.5", "keep ratio 0"),
        ("train rl4evit --set reward=keep_target --set targets=0.5", "1 targets for 3 decisions"),
        ("train dora --set target_drop=2", "target_drop=2.0|from 0 to 1"),
        ("train dora-prune --set target_drop=-0.1", "target_drop=-0.1|from 0 to 1"),
        ("train dora --set target_saving=100", "target_saving=100.0|between 0 and 100"),
        ("train dora-prune --set budget_step=1000", "budget_step=1000 doesn't fit 64|at most 60"),
        ("train dora-prune --set budget_step=0", "budget_step=0|at least 1"),
        ("train dora --set budget_step=2", "unknown key|initial_merge"),
        ("train dora --set grid=0/4/8", "--set grid=0/4/8: unknown key"),
        ("train dora --set damage=pain", "damage=pain|drift or divergence"),
        ("train dora --set critic=magic", "critic=magic|privileged or symmetric"),
        ("train dora --set penalty=0", "penalty=0.0|greater than 0"),
        ("train dora --set initial_merge=1", "initial_merge=1.0|between 0 and 1"),
        ("train dora --set features=keys/keys", "each only once"),
        ("train dora --set features=redundancy", "unknown feature 'redundancy'|similarity"),
        ("train dora --set blocks=0/12", "block 12 is out of range"),
        ("train dora --set batch=10", "batch_size=10 must be a multiple of repeats=4"),
        ("train dora --set terminal=perhaps", "terminal=perhaps|true or false"),
        ("train dora-prune --set selector=luck", "selector=luck|learned or random or redundancy"),
        ("train dora-prune --set selector=redundancy --set features=keys", "'redundancy': add it"),
        ("train dora-prune --set lean=1", "lean=1|2 values, each a number"),
        ("train dora-prune --set lean=1/2/3", "lean=1/2/3|2 values, each a number"),
        ("train dora-prune --set initial_gate=0", "initial_gate=0.0|between 0 and 1"),
        # places
        ("train rl4evit --resume", "--resume needs --out"),
        ("train rl4evit --out new --resume", "nothing to resume in 'new'"),
    ],
)
def test_mistakes(command: str, words: str, capfd: pytest.CaptureFixture[str]) -> None:
    error = mistake(command, capfd)
    for word in words.split("|"):
        assert word in error


def test_a_reward_that_overflows(capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK.split(), "--set", "beta=1e39", "--out", "r"]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert "not finite: check its parameters" in error
    assert read_tensors(Path("r", CHECKPOINT))[1]["done"] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(capfd: pytest.CaptureFixture[str]) -> None:
    for command in ("train rl4evit", "evaluate keep-all"):
        assert "'cuda' is not available" in mistake(f"{command} --device cuda", capfd)


class Evil:
    """Makes a file when unpickled."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


def test_weights_that_do_not_fit(untrained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_file(timm.create_model("test_vit").state_dict(), "other.safetensors")
    narrow = timm.create_model("digits_vit", num_classes=10)
    narrow.pos_embed = torch.nn.Parameter(torch.zeros(1, 17, 48))
    save_file(narrow.state_dict(), "shape.safetensors")
    save_file({"head.bias": torch.zeros(10)}, "part.safetensors")
    for name in ("noise.pth", "noise.safetensors", "noise.bin"):
        Path(name).write_bytes(bytes(range(256)) * 20)
    Path("evil.pth").write_bytes(pickle.dumps(Evil()))
    torch.save({"head.weight": Evil()}, "hidden.pth")
    torch.save([1, 2], "list.pth")
    for name, words in {
        "other.safetensors": "don't fit model 'digits_vit'",
        "shape.safetensors": "pos_embed",
        "part.safetensors": "missing",
        "noise.pth": "cannot be read",
        "noise.safetensors": "cannot be read",
        "noise.bin": "cannot be read",
        "evil.pth": "cannot be read",
        "hidden.pth": "cannot be read",
        "list.pth": "no state dict",
    }.items():
        error = mistake(f"evaluate keep-all --weights {name}", capfd)
        assert name in error
        assert words in error
    assert "evil.pth" in mistake("train rl4evit --weights evil.pth", capfd)
    assert not Path("executed").exists()


def test_folders_that_do_not_do(capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("empty", "hollow/0", "flat", "strange/cat", "strange/dog"):
        Path(name).mkdir(parents=True)
    Image.new("L", (8, 8)).save("flat/a.png")
    Image.new("L", (8, 8)).save("strange/cat/a.png")
    Image.new("L", (8, 8)).save("strange/dog/a.png")
    for label in ("0", "1"):
        for number in range(4):
            path = Path("broken", label, f"{number}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"no picture")
    for name, words in {
        "empty": "no class folders",
        "hollow": "no image in its 1 class folders",
        "flat": "images but no class folders",
        "strange": "class 'cat' is no label of the model",
        "broken": "rea",
    }.items():
        for command in ("evaluate keep-all", "train rl4evit --set batch=4"):
            error = mistake(f"{command} --data {name}", capfd)
            assert name in error
            assert words in error


def test_another_models_images_and_policies(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = timm.create_model("test_vit", num_classes=10)
    save_file(model.state_dict(), "other.safetensors")
    write_digits(Path("images"), 12)
    other = "--model test_vit --weights other.safetensors"
    assert main(shlex.split(f"evaluate keep-all:blocks=2 --data images {other}")) == 0
    error = mistake(f"evaluate {run} --data images {other}", capfd)
    assert "'digits_vit', not on 'test_vit'" in error


def test_no_run_at_all(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    assert "'empty' is neither a run folder" in mistake("evaluate empty", capfd)
    content = (run / "policy.safetensors").read_bytes()
    for name, bad in {
        "cut": content[:-100],
        "nothing": b"",
        "noise": bytes(range(256)) * 9,
        "checkpoint": (run / CHECKPOINT).read_bytes(),
        "weights": WEIGHTS.read_bytes(),
    }.items():
        Path(name).mkdir()
        Path(name, "policy.safetensors").write_bytes(bad)
        assert f"{name}/policy.safetensors" in mistake(f"evaluate {name}", capfd)
    for name, config in {"text": "no json", "list": "[]", "other": "{}"}.items():
        Path(name).mkdir()
        Path(name, "policy.safetensors").write_bytes(content)
        Path(name, "config.json").write_text(config)
        assert f"{name}/config.json" in mistake(f"evaluate {name}", capfd)


def test_a_policy_alone_knows_its_model(run: Path) -> None:
    Path("alone").mkdir()
    Path("alone/policy.safetensors").write_bytes((run / "policy.safetensors").read_bytes())
    assert evaluation("alone --limit 10")["model"] == "digits_vit"


def test_a_run_is_never_overwritten(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = tree(run)
    error = mistake(f"{QUICK} --out {run}", capfd)
    assert str(run) in error
    assert "--resume" in error
    error = mistake(f"{QUICK} --out {run} --resume --set beta=0.25", capfd)
    assert "beta=0.25" in error
    assert f"started with beta={RL4EViTConfig.for_digits().beta}" in error
    error = mistake(f"{QUICK} --out {run} --resume --seed 7", capfd)
    assert "seed=7" in error
    assert tree(run) == before

    Path("finished").mkdir()
    Path("finished/policy.safetensors").write_bytes(b"all that is left")
    assert "'finished' already holds a run" in mistake(f"{QUICK} --out finished", capfd)


def test_a_broken_checkpoint(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("broken").mkdir()
    content = (run / CHECKPOINT).read_bytes()
    for bad in (content[: len(content) // 2], b""):
        Path("broken", CHECKPOINT).write_bytes(bad)
        error = mistake(f"{QUICK} --out broken --resume", capfd)
        assert f"broken/{CHECKPOINT}" in error


def test_places_that_cannot_be_written_to(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("file").touch()
    Path("folder").mkdir()
    monkeypatch.setattr(metrics, "evaluate", fail)  # nobody may compute first
    assert "'file' is a file" in mistake(f"{QUICK} --out file", capfd)
    assert "'file/below'" in mistake(f"{QUICK} --out file/below", capfd)
    assert "'file'" in mistake("evaluate keep-all --json file/below.json", capfd)
    assert "'folder' is a folder" in mistake("evaluate keep-all --json folder", capfd)

    def forbidden(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(common.tempfile, "TemporaryFile", forbidden)
    for command, name in {
        f"{QUICK} --out new/run": "new/run",
        f"{QUICK} --out folder": "folder",
        QUICK: "runs",
        "evaluate keep-all --json new/r.json": "new",
    }.items():
        error = mistake(command, capfd)
        assert f"'{name}' (Permission denied)" in error


def test_a_disk_that_fills_up_loses_no_numbers(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main(["evaluate", "keep-all", "--limit", "10", "--json", "r.json"]) == 2
    captured = capfd.readouterr()
    assert "same top-1" in captured.out
    assert captured.err.count("\n") == 1
    assert "No space left on device" in captured.err
    assert not list(Path.cwd().iterdir())


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
