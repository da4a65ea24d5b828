"""ONNX files: batches, the same logits in another runtime, what they say, and their measurement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from command_line import write_digits
from torch import Tensor
from torch.testing import assert_close

import tokenenv
import tokenenv.vit.digits
from tokenenv import UserError
from tokenenv.api.compress import measure
from tokenenv.onnx_file import stored_weights
from tokenenv.vit.digits import digits

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.usefixtures("elsewhere")


def images(count: int) -> Tensor:
    return (digits("test")[0][:count].float() / 255 - 0.305) / 0.376


def compressed(what: str, execution: Any = None) -> tokenenv.CompressedViT:
    return tokenenv.compress(timm.create_model("digits_vit", pretrained=True), what, execution)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[tokenenv.CompressedViT, Path]:
    fast = compressed("tome:r=8,blocks=2/5")
    measure(fast, "digits", limit=50, batches=(1,))
    path, steps = tmp_path_factory.mktemp("onnx") / "fast.onnx", list[str]()
    tokenenv.export_onnx(fast, path, steps.append)
    assert len(steps) == 3
    return fast, path


@pytest.mark.parametrize(
    ("what", "execution"),
    [
        ("evit:keep=0.6,blocks=2/4/6", None),  # 24 of 40: a share that float32 rounds up
        ("resize:size=6", None),
        pytest.param("ats:tokens=40,blocks=2/3", "padded", marks=pytest.mark.slow),
        pytest.param("merge-above:similarity=0.8,blocks=3", "padded", marks=pytest.mark.slow),
        pytest.param("merge-above:similarity=0.8,blocks=3/7", "masked", marks=pytest.mark.slow),
    ],
)
def test_a_batch_of_any_size_has_the_logits_of_torch(what: str, execution: Any) -> None:
    fast, pixels = compressed(what, execution), images(9)
    tokenenv.export_onnx(fast, "fast.onnx")
    found = tokenenv.load_onnx("fast.onnx")
    assert found.batched
    with torch.inference_mode():
        expected = fast(pixels)
    for count in (1, 2, 9):
        assert_close(found(pixels[:count]), expected[:count], atol=1e-4, rtol=0)


def test_tokens_leave_the_graph(exported: tuple[tokenenv.CompressedViT, Path]) -> None:
    shapes = onnx.shape_inference.infer_shapes(onnx.load(exported[1])).graph.value_info
    lengths = {
        value.type.tensor_type.shape.dim[1].dim_value
        for value in shapes
        if len(value.type.tensor_type.shape.dim) == 3
        and value.type.tensor_type.shape.dim[2].dim_value == 48
    }
    assert {65, 57, 49} <= lengths


def test_a_file_says_what_it_is(exported: tuple[tokenenv.CompressedViT, Path]) -> None:
    fast, path = exported
    model = onnx.load(path)
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [20]
    (entry,) = model.metadata_props
    said = json.loads(entry.value)
    assert said["model"] == "digits_vit" and said["method"] == "tome:r=8,blocks=2/5"
    assert said["classes"] == [str(digit) for digit in range(10)]
    assert said["preprocessing"]["mean"] == [0.305] and said["measured"]["images"] == 50
    assert "threads" in said["measured"]["machine"]
    held, own = stored_weights(path), fast.model.state_dict()
    assert held.keys() == own.keys()
    assert all(torch.equal(held[name], own[name]) for name in own)
    assert path.stat().st_size < 2 * sum(tensor.nbytes for tensor in own.values())  # once each


def test_predictions_are_those_of_torch(exported: tuple[tokenenv.CompressedViT, Path]) -> None:
    write_digits(Path("data"), 8)
    files = sorted(Path("data").rglob("*.png"))
    found, expected = (
        each.predict(files, top=2) for each in (tokenenv.load_onnx(exported[1]), exported[0])
    )
    assert [each.names for each in found] == [each.names for each in expected]
    for one, other in zip(found, expected, strict=True):
        assert_close(one.probabilities, other.probabilities, atol=1e-4, rtol=0)


def test_evaluate_and_bench_run_the_file_beside_dense_onnx(
    exported: tuple[tokenenv.CompressedViT, Path],
) -> None:
    fast, path = exported
    found = tokenenv.evaluate(str(path), limit=60)
    expected = tokenenv.evaluate(fast, limit=60)
    assert found.predictions() == expected.predictions()
    numbers = found.evaluation.report()
    assert numbers["gmacs"] == pytest.approx(expected.evaluation.report()["gmacs"])
    speeds = tokenenv.bench([str(path)], batch=(2,), rounds=1, compile="none", smaller=False)
    names = [row.name for row in speeds.rows]
    assert names == ["dense", "dense, ONNX Runtime", str(path)]
    assert {row.dtype for row in speeds.rows} == {"float32"}
    assert max(row.speedup for row in speeds.rows[:2]) == pytest.approx(1)  # the fastest is 1


def test_files_that_cannot_be_used_are_one_line(
    exported: tuple[tokenenv.CompressedViT, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: str, **options: Any) -> str:
        with pytest.raises(UserError) as error:
            tokenenv.evaluate(path, limit=5, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "cannot read 'gone.onnx' (FileNotFoundError)" in refused("gone.onnx")
    Path("text.onnx").write_text("no protobuf")
    assert "cannot read 'text.onnx' as ONNX of tokenenv" in refused("text.onnx")
    model = onnx.load(exported[1])
    said = json.loads(model.metadata_props[0].value)
    model.metadata_props[0].value = json.dumps(said | {"classes": ["one"]})
    onnx.save(model, "names.onnx")
    assert "1 class names" in refused("names.onnx")
    model.metadata_props[0].value = json.dumps(said | {"measured": {}})
    onnx.save(model, "unmeasured.onnx")
    assert "'unmeasured.onnx' doesn't say what it computes (no 'gmacs')" in refused(
        "unmeasured.onnx"
    )
    model.metadata_props[0].value = json.dumps(said | {"weights": {"head.weight": "gone"}})
    onnx.save(model, "weightless.onnx")
    assert "cannot read 'weightless.onnx'" in refused("weightless.onnx")
    del model.metadata_props[:]
    onnx.save(model, "foreign.onnx")
    assert "it doesn't say which model it holds" in refused("foreign.onnx")
    onnx.save(model, "apart.onnx", save_as_external_data=True, size_threshold=0)
    assert "it refers to other files" in refused("apart.onnx")
    assert "was made from 'digits_vit', not 'scenes_vit'" in refused(
        str(exported[1]), model="scenes_vit"
    )
    assert "runs in float32 on the CPU" in refused(str(exported[1]), dtype="bfloat16")
    with pytest.raises(UserError, match="is a whole model: give the method"):
        tokenenv.compress("digits_vit", str(exported[1]))
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    assert "ONNX needs the package 'onnxruntime'" in refused(str(exported[1]))


def test_a_file_that_gives_other_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenenv.deploy.runtime import OnnxModel

    run = OnnxModel.__call__
    monkeypatch.setattr(OnnxModel, "__call__", lambda self, x: run(self, x) + 1e-3)
    with pytest.raises(UserError, match=r"differ by 0\.000\d+ from the model's"):
        tokenenv.export_onnx(compressed("norm:keep=0.5,blocks=2"), "fast.onnx")
    assert not Path("fast.onnx").exists()
