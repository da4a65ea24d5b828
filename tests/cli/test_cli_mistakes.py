"""The command line: one line for every mistake, and nothing is lost."""

from __future__ import annotations

import os
import pickle
import shlex
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from command_line import QUICK, evaluation, fail, mistake, tree, write_digits
from PIL import Image
from safetensors.torch import save_file

from agents.systems.rl4evit import RL4EViTConfig
from agents.training.trainer import CHECKPOINT
from tokenenv import measure, storage
from tokenenv.cli.main import main
from tokenenv.storage import read_tensors
from tokenenv.vit.digits import WEIGHTS

pytestmark = pytest.mark.usefixtures("elsewhere")


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
        ("watch tome:r=8", "--out"),
        ("watch tome:r=8 --out a.png", "'a.png' does not end with .gif"),
        ("watch tome:r=8 --index 3,x --out a.gif", "'x' is no whole number from 0"),
        ("watch tome:r=8 --index 0,600 --out a.gif", "index=600 is outside|600 images"),
        ("watch resize:size=4 --out a.gif", "no decisions about tokens"),
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
        ("evaluate keep-all --device meta", "'meta'|--device cpu"),
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
        (
            "train rl4evit --set hidden=a/b",
            "hidden=a/b|one value or several|each a whole number",
        ),
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
        ("train rl4evit --set blocks=x", "blocks=x|separated by slashes, each a whole number"),
        ("train rl4evit --set batch=5000", "batch=5000|--set batch="),
        ("train rl4evit --set batch=10 --set repeats=4", "batch=10|repeats=4|--set batch=12"),
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
        ("train dora --set penalty=0", "penalty=0.0|above 0 and at most 1e6"),
        ("train dora --set penalty=1e300", "penalty=1e+300|above 0 and at most 1e6"),
        ("train dora --set lean=nan/0/0", "lean=nan/0.0/0.0|finite numbers"),
        ("train dora --set initial_merge=1", "initial_merge=1.0|between 0 and 1"),
        ("train dora --set features=keys/keys", "each only once"),
        ("train dora --set features=redundancy", "unknown feature 'redundancy'|similarity"),
        ("train dora --set blocks=0/12", "block 12 is out of range"),
        ("train dora --set batch=10", "batch=10|repeats=4|--set batch=12"),
        ("train dora --set batch=1", "batch=1|repeats=4|--set batch=4"),
        ("train dora --set terminal=perhaps", "terminal=perhaps|true or false"),
        ("train dora-prune --set selector=luck", "selector=luck|learned or random or redundancy"),
        ("train dora-prune --set selector=redundancy --set features=keys", "'redundancy': add it"),
        ("train dora-prune --set lean=1", "lean=1|2 values, each a number"),
        ("train dora-prune --set lean=1/2/3", "lean=1/2/3|2 values, each a number"),
        ("train dora-prune --set initial_gate=0", "initial_gate=0.0|between 0 and 1"),
        (
            "train dora-prune --set initial_budget=many",
            "initial_budget=many|one value or several separated by slashes, each a number",
        ),
        ("train dora-prune --set initial_budget=9/0", "initial_budget=9.0/0.0|numbers from 1"),
        ("train dora-prune --set initial_budget=nan", "initial_budget=nan|a finite number"),
        (
            "train dora-prune --set initial_budget=61",
            "initial_budget=61.0 is more than can leave|of 64 tokens 4 stay|at most 60",
        ),
        (
            "train dora-prune --set initial_budget=9/8",
            "initial_budget=9.0/8.0 is for 2 decision blocks and there are 4|one for each",
        ),
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


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("compressed.json", "{bad"),
        ("compressed.json", "[]"),
        ("config.json", '{"model": 5, "weights": null}'),
        ("config.json", '{"model": "digits_vit", "weights": 7}'),
    ],
)
def test_a_damaged_run(
    name: str, content: str, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("damaged").mkdir()
    Path("damaged/policy.safetensors").write_bytes((run / "policy.safetensors").read_bytes())
    Path("damaged", name).write_text(content)
    assert f"'damaged/{name}' doesn't say model" in mistake("evaluate damaged", capfd)


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
    monkeypatch.setattr(
        measure.evaluation, "_side_by_side", fail
    )  # the mistake is found before any work
    assert "'file' is a file" in mistake(f"{QUICK} --out file", capfd)
    assert "'file/below'" in mistake(f"{QUICK} --out file/below", capfd)
    assert "'file'" in mistake("evaluate keep-all --json file/below.json", capfd)
    assert "'folder' is a folder" in mistake("evaluate keep-all --json folder", capfd)

    def forbidden(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(storage.tempfile, "TemporaryFile", forbidden)
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
