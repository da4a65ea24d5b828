"""Compressed models for other runtimes: the same logits, with tokens that really leave."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from command_line import mistake, tree
from torch.testing import assert_close

import agents
import tokenenv
from tokenenv import UserError
from tokenenv.cli.main import main
from tokenenv.deploy import onnx
from tokenenv.vit.digits import digits

pytestmark = pytest.mark.usefixtures("elsewhere")


def compressed(spec: str, execution: Any = None) -> tokenenv.CompressedViT:
    model = timm.create_model("digits_vit", pretrained=True)
    return tokenenv.compress(model, agents.parse_policy(spec, len(model.blocks)), execution)


def images(count: int) -> torch.Tensor:
    return (digits("test")[0][:count].float() / 255 - 0.305) / 0.376


def onnx_logits(path: str, pixels: torch.Tensor) -> torch.Tensor:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(path)
    return torch.cat(
        [torch.from_numpy(session.run(None, {"images": x[None].numpy()})[0]) for x in pixels]
    )


@pytest.mark.parametrize(
    "spec", ["cls-attention:keep=0.4,blocks=2/6", "merge-above:similarity=0.8,blocks=3/7"]
)
def test_onnx_gives_the_same_logits(spec: str) -> None:
    pytest.importorskip("onnxscript")
    pixels = images(12)
    assert main(["compress", spec, "--out", "fast", "--export", "fast.onnx"]) == 0
    assert {path.name for path in Path.cwd().iterdir()} == {"fast", "fast.onnx"}
    fast = tokenenv.load_compressed("fast")
    with torch.inference_mode():
        assert_close(onnx_logits("fast.onnx", pixels), fast(pixels), atol=1e-4, rtol=0)
        lengths = fast._play(pixels).counts[-1]
    assert lengths.max() < 64 and (len(lengths.unique()) > 3) == spec.startswith("merge")


@pytest.mark.parametrize(
    "spec", ["norm:keep=0.4,blocks=2/6", "merge-above:similarity=0.8,blocks=3"]
)
def test_torch_export_follows_both_ways(spec: str) -> None:
    pixels = images(6)
    masked, single = compressed(spec, "masked"), compressed(spec)
    batch = torch.export.Dim("batch", min=1, max=512)
    with torch.inference_mode():
        expected = single(pixels)
    with torch.no_grad():
        whole = torch.export.export(masked, (pixels[:3],), dynamic_shapes={"x": {0: batch}})
        one = torch.export.export(single, (pixels[:1],), strict=False)
        assert_close(whole.module()(pixels), expected, atol=1e-4, rtol=0)
        for i in range(3):
            found = one.module()(pixels[i : i + 1])
            assert_close(found, expected[i : i + 1], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "spec",
    [
        "pitome:keep=0.5", "pitome:keep=0.9,blocks=2/3", "diffrate:prune=4,merge=4,blocks=1/2/3/9",
        "ats:tokens=40,blocks=2/3", "ats:tokens=1,blocks=2", "tome:r=4,blocks=2/3",
    ],
)  # fmt: skip
def test_published_methods_are_exported(spec: str) -> None:
    pixels, single = images(3), compressed(spec)
    with torch.no_grad():
        one = torch.export.export(single, (pixels[:1] * 0,), strict=False).module()
        for pixel in pixels:
            assert_close(one(pixel[None]), single(pixel[None]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("spec", ["random-merge:r=4,blocks=2/3", "random:keep=0.5,blocks=2"])
def test_random_methods_draw_anew_once_they_are_exported(spec: str) -> None:
    pixels = images(1)
    with torch.no_grad():
        one = torch.export.export(compressed(spec), (pixels,), strict=False).module()
        torch.manual_seed(0)
        assert len({tuple(one(pixels)[0].tolist()) for _ in range(4)}) > 1


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        (RuntimeError("Could not guard on\n  u0"), "RuntimeError: Could not guard on u0"),
        (NotImplementedError(), "NotImplementedError"),
        (RuntimeError("\x1b[96mThis is step 3\x1b[0m"), "RuntimeError: This is step 3)"),
    ],
)
def test_what_torch_cannot_export_is_one_line_and_no_half_folder(
    reason: Exception, words: str, capfd: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise reason

    monkeypatch.setattr(onnx, "check_export", lambda: None)
    monkeypatch.setattr(torch.export, "export", refuse)
    error = mistake("compress pitome:keep=0.9 --out fast --export fast.onnx", capfd)
    assert f"torch can't export a policy of class PiToMe ({words}" in error
    assert not list(Path.cwd().iterdir())


def test_the_export_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "check_export", lambda: None)
    with pytest.raises(UserError, match=r"float32 only, not bfloat16: give it model\.float\(\)"):
        tokenenv.export_onnx(compressed("norm:keep=0.5").to(torch.bfloat16), "fast.onnx")


def test_the_command_writes_what_load_compressed_reads(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "tome:r=4", "--out", "a/fast"]) == 0
    assert "load_compressed('a/fast')" in capsys.readouterr().out
    back = tokenenv.load_compressed("a/fast")
    with torch.inference_mode():
        assert torch.equal(back(images(3)), compressed("tome:r=4")(images(3)))


def test_a_missing_onnx_file_is_told_before_a_missing_package(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "cannot read 'gone.onnx' (FileNotFoundError)" in mistake("evaluate gone.onnx", capfd)
    Path("there.onnx").touch()
    assert "ONNX needs the package 'onnx'" in mistake("evaluate there.onnx", capfd)


def test_a_long_name_is_cut(capfd: pytest.CaptureFixture[str]) -> None:
    assert len(mistake(f"compress tome:r=2 --model {'x' * 3000} --out fast", capfd)) < 300


def test_mistakes(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("full").mkdir()
    Path("full/file").touch()
    for command, words in {
        "compress norm:keep=0.5": "--out",
        "compress nonsense --out x": "'nonsense' is neither a run folder nor a policy",
        "compress norm:keep=0.5 --out full": "'full' exists already",
        "compress norm:keep=0.5 --out full/file/x": "cannot write to 'full/file/x'",
        "compress norm:keep=0.5 --out x --export x": "give them different names",
        "compress norm:keep=0.5 --out x --export full": "--export 'full' is a folder",
        "compress norm:keep=0.5 --out x --export full/file/x": "cannot write to 'full/file'",
        "compress norm:keep=0.5,blocks=99 --out x": "block 99 is out of range",
        "compress rl4evit-deit_tiny --model digits_vit --out x": "not on 'digits_vit'",
    }.items():
        assert words in mistake(command, capfd), command
    with pytest.raises(UserError, match=r"cannot write 'gone/x\.onnx': give the name of a file"):
        tokenenv.export_onnx(compressed("norm:keep=0.5"), "gone/x.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    before = tree(Path.cwd())
    with pytest.raises(UserError, match=r"pip install 'tokenenv\[export\]'"):
        tokenenv.export_onnx(compressed("norm:keep=0.5,blocks=2"), "x.onnx")
    error = mistake("compress norm:keep=0.5 --out x --export x.onnx", capfd)
    assert "needs the package 'onnxscript'" in error or "needs the package 'onnx'" in error
    assert tree(Path.cwd()) == before
