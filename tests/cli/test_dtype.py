"""``--dtype``: every model of a command computes in it, policies decide in float32 all the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from command_line import evaluation, mistake, write_digits
from safetensors.torch import load_file, save_file

import tokenenv
from tokenenv import ltm
from tokenenv.cli.main import main
from tokenenv.envs.vector_base import GameVectorEnv
from tokenenv.vit.digits import WEIGHTS
from tokenenv.vit.load import load_model

pytestmark = pytest.mark.usefixtures("elsewhere", "one_thread")


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[torch.dtype]]:
    """What went into models since, and what came out of their blocks' linear layers.

    Of batches: a single image is what a model is tried on while it is loaded.
    """
    seen: dict[str, set[torch.dtype]] = {"in": set(), "out": set()}
    embed, linear = torch.nn.Conv2d.forward, torch.nn.functional.linear

    def watched(self: Any, images: torch.Tensor) -> torch.Tensor:
        if len(images) > 1:
            seen["in"].add(images.dtype)
        return embed(self, images)

    def watched_linear(x: torch.Tensor, *args: Any) -> torch.Tensor:
        out = linear(x, *args)
        if out.shape[-1] == 3 * 48 and len(x) > 1:  # queries, keys, values of the embedded model
            seen["out"].add(out.dtype)
        return out

    monkeypatch.setattr(torch.nn.Conv2d, "forward", watched)
    monkeypatch.setattr(torch.nn.functional, "linear", watched_linear)
    return seen


def forget(used: dict[str, set[torch.dtype]]) -> None:
    """What was run to prepare a test."""
    for seen in used.values():
        seen.clear()


def tuned_run(folder: Path) -> None:
    """A fine-tuned run with the embedded model's own weights."""
    assert main(["compress", "tome:r=4", "--out", "kept"]) == 0
    folder.mkdir()
    Path("kept/policy.safetensors").rename(folder / "policy.safetensors")
    start = {"model": "digits_vit", "weights": str(WEIGHTS), "frozen": False}
    (folder / "config.json").write_text(json.dumps(start))
    save_file(load_file(WEIGHTS), folder / "model.safetensors")


BFLOAT = {"in": {torch.bfloat16}, "out": {torch.bfloat16}}


@pytest.mark.parametrize("what", ["tome:r=8", "cls-attention:keep=0.5", "tuned"])
def test_evaluate(
    what: str, used: dict[str, set[torch.dtype]], capsys: pytest.CaptureFixture[str]
) -> None:
    if what == "tuned":
        tuned_run(Path("tuned"))
    whole = evaluation(f"{what} --limit 60")
    forget(used)
    half = evaluation(f"{what} --limit 60 --dtype bfloat16")
    assert used == BFLOAT
    assert (whole["dtype"], half["dtype"]) == ("float32", "bfloat16")
    assert "in bfloat16" in capsys.readouterr().out
    assert half["gmacs"] == pytest.approx(whole["gmacs"], rel=0.01)
    pairs = zip(whole["predictions"], half["predictions"], strict=True)
    assert sum(a["reduced"] == b["reduced"] for a, b in pairs) >= 57


def test_bench(used: dict[str, set[torch.dtype]], capsys: pytest.CaptureFixture[str]) -> None:
    command = "bench tome:r=8 --batch 2 --rounds 1 --compile none --dtype bfloat16"
    assert main(command.split()) == 0
    assert used == BFLOAT
    lines = capsys.readouterr().out.splitlines()[2:]
    assert len(lines) == 3 and all(" bfloat16 " in line for line in lines)


def test_compare(used: dict[str, set[torch.dtype]]) -> None:
    tuned_run(Path("tuned"))
    forget(used)
    command = "compare tuned tome:r=8 --limit 20 --batch 2 --rounds 1 --dtype bfloat16"
    assert main(command.split()) == 0
    assert used == BFLOAT
    assert "bfloat16" in json.loads(Path("compare/table.json").read_text())["timing"]


def test_models_with_ltm_blocks(used: dict[str, set[torch.dtype]]) -> None:
    ltm.save_ltm(ltm.ltm(load_model("digits_vit"), ratio=0.5), "merged")
    write_digits(Path("images"), 20)
    forget(used)
    for command in (
        "evaluate merged --data images --dtype bfloat16",
        "bench merged --batch 2 --rounds 1 --compile none --dtype bfloat16",
        "compare merged --data images --batch 2 --rounds 1 --dtype bfloat16",
    ):
        assert main(command.split()) == 0
        assert used == BFLOAT, command


def test_compress(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "tome:r=8", "--out", "fast", "--dtype", "bfloat16"]) == 0
    said = capfd.readouterr().out
    assert "x at batch 1, " in said and "x at batch 8; 'tokenenv bench' measures it" in said
    fast = tokenenv.load_compressed("fast")
    assert fast.backbone.dtype is torch.bfloat16
    images = torch.rand(3, 1, 8, 8, dtype=torch.bfloat16)
    with torch.inference_mode():
        assert fast(images).dtype is torch.bfloat16
    error = mistake("compress tome:r=8 --out b --export b.onnx --dtype bfloat16", capfd)
    assert "--export writes float32 only, not bfloat16" in error


@pytest.mark.parametrize("system", ["rl4evit", "dora", "dora-prune"])
def test_train(
    system: str, used: dict[str, set[torch.dtype]], capfd: pytest.CaptureFixture[str]
) -> None:
    command = (
        f"train {system} --images 40 --set updates=1 --set batch=16 --set evaluate_every=1 "
        "--set calibrate=1 --out run"
    )
    assert main([*command.split(), "--dtype", "bfloat16"]) == 0
    assert used == BFLOAT
    assert json.loads(Path("run/config.json").read_text())["dtype"] == "bfloat16"
    learned = load_file("run/policy.safetensors")
    assert {t.dtype for t in learned.values() if t.is_floating_point()} == {torch.float32}
    error = mistake(f"{command} --resume", capfd)
    assert "dtype=float32" in error
    assert "bfloat16" in error


def test_fine_tuning_has_its_own_half_precision(capfd: pytest.CaptureFixture[str]) -> None:
    assert "--set amp=bfloat16" in mistake("train mstm --out run --dtype bfloat16", capfd)


@pytest.mark.parametrize("name", ["TokenPrune", "LayerMerge", "LayerPrune"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_environments(name: str, dtype: str, used: dict[str, set[torch.dtype]]) -> None:
    envs = gymnasium.make_vec(f"tokenenv/{name}-v0", num_envs=8, dtype=dtype)
    seen, _ = envs.reset(seed=0)
    assert isinstance(envs, GameVectorEnv)
    for _ in range(envs.max_cycles):
        assert seen.dtype == np.float32
        assert np.isfinite(seen).all()
        seen, rewards, *_ = envs.step(envs.action_space.sample())
        assert np.isfinite(rewards).all()
    half = {getattr(torch, dtype)}
    assert used == {"in": half, "out": half}


def test_an_environment_of_an_unknown_one() -> None:
    with pytest.raises(tokenenv.UserError, match="'float64': choose from float32, bfloat16"):
        gymnasium.make("tokenenv/TokenPrune-v0", dtype="float64")


@pytest.mark.parametrize("command", ["evaluate keep-all", "bench keep-all", "train dora"])
def test_an_unknown_one(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert "float8" in mistake(f"{command} --dtype float8", capfd)
