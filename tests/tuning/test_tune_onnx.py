"""Tuning with ONNX Runtime: which runtime is tried, what is recommended, what is written."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import tokenenv
from tokenenv.api import tune as module
from tokenenv.api import tune_onnx
from tokenenv.errors import UserError
from tokenenv.measure.speed import bench
from tokenenv.tuning.search import Search
from tokenenv.tuning.state import State
from tokenenv.vit.load import load_backbone

pytestmark = pytest.mark.usefixtures("elsewhere")
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs the extra export",
)

FEW = ["tome:r=6,blocks=2/5", "evit:keep=0.5,blocks=4", "merge-above:similarity=0.9,blocks=3"]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few candidates, and a clock on which ONNX Runtime takes half the time; methods take less."""
    monkeypatch.setattr(module, "words_for", lambda backbone: FEW)
    monkeypatch.setattr(Search, "rates", lambda self: [])

    def seconds(form: Any) -> Any:
        what, runtime = getattr(form, "what", form), getattr(form, "runtime", "")
        if "through" in what:
            return np.full(7, 0.25)
        if "ONNX" in what + runtime:
            return np.full(7, 0.5)
        return np.full(7, 1.0 if what in ("dense", "float32") else 0.8)

    quick = lambda runs, *rest, **more: {form: seconds(form) for form in runs}  # noqa: E731
    monkeypatch.setattr(tune_onnx, "in_turns", quick)
    monkeypatch.setattr("tokenenv.tuning.search.in_turns", quick)
    monkeypatch.setattr("tokenenv.measure.speed.in_turns", quick)


def tune(**more: Any) -> Any:
    return tokenenv.tune(**{"budget": 6.0, "batch": 4, "dtype": "float32", "limit": 200, **more})


@needs_onnx
@pytest.mark.usefixtures("few")
def test_the_recommendation_is_over_dense_onnx_and_its_file_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    graph_bytes = tune_onnx.graph_bytes

    def refusing(fast: Any, show: Any) -> bytes:
        if fast.policy.reduction.blocks == (4,):
            raise UserError("torch can't export this one")
        return graph_bytes(fast, show)

    monkeypatch.setattr(tune_onnx, "graph_bytes", refusing)
    found = tune(out="fast", runtime="auto")
    out = capsys.readouterr().out
    assert "in ONNX Runtime is 2.00 x as fast as in torch (float32)" in out
    assert "'evit:keep=0.5,blocks=4' is not tried in ONNX Runtime: torch can't export" in out
    best = found.recommended
    assert best is not None and best.what.endswith(" through ONNX Runtime")
    assert best.speed.runtime == "ONNX Runtime" and best.speed.speedup == 2.0  # not 4
    assert [(row.runtime, row.speedup) for row in found.dense] == [
        ("torch", 0.5),
        ("ONNX Runtime", 1.0),
    ]
    assert {row.speed.runtime for row in found.rows} == {"ONNX Runtime"}
    word = best.what.removesuffix(" through ONNX Runtime")
    file = tokenenv.evaluate("fast/model.onnx").evaluation
    again = tokenenv.evaluate(word, model="digits_vit").evaluation
    assert torch.equal(file.reduced, again.reduced)
    assert tokenenv.load_compressed("fast").method == word
    said = tokenenv.load_onnx("fast/model.onnx").said["measured"]
    assert said["speed"][0]["runtime"] == "ONNX Runtime" and said["images"] == 120
    trials = {
        each["what"]: each for each in json.loads(Path("fast/tune.json").read_text())["tried"]
    }
    assert trials[best.what]["divergence"] == pytest.approx(trials[word]["divergence"], abs=1e-5)
    assert trials[word]["speedup"] is None  # not timed in torch


@needs_onnx
@pytest.mark.usefixtures("few")
def test_a_recommendation_in_torch_can_be_exported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick: dict[str, Any] = {"only_methods": True, "methods": ["tome:r=2,blocks=2"]}
    found = tune(export="fast.onnx", **quick)
    assert found.recommended is not None and found.recommended.speed.runtime == "torch"
    assert "fast.onnx is the model in float32" in capsys.readouterr().out
    said = tokenenv.load_onnx("fast.onnx").said
    assert said["method"] == "tome:r=2,blocks=2"
    assert said["measured"]["speed"][0]["runtime"] == "torch"
    monkeypatch.setattr("tokenenv.measure.speed.in_turns", lambda runs, *rest, **more: {
        form: np.ones(7) for form in runs
    })  # fmt: skip
    assert tune(export="slow.onnx", **quick).recommended is None
    assert "slow.onnx is not written: nothing is recommended" in capsys.readouterr().out
    assert not Path("slow.onnx").exists()


def test_the_runtime_that_is_far_ahead_is_tried_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = load_backbone("digits_vit")
    for lead, asked, tried in (
        (1.6, "auto", "ONNX Runtime alone"),
        (1.4, "auto", "both"),
        (0.7, "auto", "both"),
        (0.6, "auto", "torch alone"),
        (0.6, "onnx", "ONNX Runtime alone"),
    ):
        monkeypatch.setattr(
            tune_onnx, "OnnxForms", lambda *rest, lead=lead: SimpleNamespace(lead=lead)
        )
        state: Any = State(None, {})
        forms = tune_onnx.open_forms(asked, state, backbone, backbone, None, 1)  # type: ignore[arg-type]
        assert f"methods are tried in {tried}" in capsys.readouterr().out
        assert (forms is None) == (tried == "torch alone")
        assert forms is None or forms.alone == (tried == "ONNX Runtime alone")
    assert tune_onnx.open_forms("torch", state, backbone, backbone, None, 1) is None  # type: ignore[arg-type]


def test_another_form_of_the_dense_model_can_be_the_fastest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backbone = load_backbone("digits_vit", dtype=torch.bfloat16)
    monkeypatch.setattr("tokenenv.measure.speed.in_turns", lambda runs, *rest, **more: {
        form: np.full(3, 1.0 if form.runtime == "torch" else 0.5) for form in runs
    })  # fmt: skip
    images = torch.randn(8, *backbone.image_shape).bfloat16()
    rows = bench(backbone, [], images, batch=2, dense_forms={"elsewhere": backbone})
    assert [(row.name, row.dtype, row.speedup) for row in rows] == [
        ("dense", "bfloat16", 0.5),
        ("dense, elsewhere", "float32", 1.0),
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"runtime": "tvm"}, "runtime='tvm': choose from torch, onnx, auto"),
        ({"export": "gone/fast.onnx"}, r"cannot write 'gone/fast\.onnx'"),
    ],
)
def test_mistakes(words: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tune(**words)


def test_packages_and_precisions_are_checked_before_any_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tune_onnx, "check_export", lambda: None)
    with pytest.raises(UserError, match="ONNX files are in float32, not bfloat16"):
        tune(runtime="onnx", dtype="bfloat16")
    with pytest.raises(UserError, match="on the CPU, not on 'cuda'"):
        tune(runtime="auto", device="cuda")
    monkeypatch.undo()
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    monkeypatch.setattr(module, "_Tuning", None)  # it would be called
    for words in ({"runtime": "onnx"}, {"runtime": "auto"}, {"export": "fast.onnx"}):
        with pytest.raises(UserError, match=r"ONNX needs the package '\w+': pip install"):
            tune(**words)
