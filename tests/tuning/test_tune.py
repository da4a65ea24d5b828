"""The command and the function: a search on the digits from end to end, mistakes, going on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import write_digits

import tokenenv
from tokenenv.api import tune as module
from tokenenv.api.tune_inputs import seconds_of
from tokenenv.cli.main import main
from tokenenv.errors import UserError
from tokenenv.tuning.search import Search
from tokenenv.tuning.trials import Reference

pytestmark = pytest.mark.usefixtures("elsewhere")

FEW = ["tome:r=6,shuffle=0", "evit:keep=0.5", "resize:size=24", "merge-above:similarity=0.9"]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few candidates, no search for schedules, and short timings."""
    monkeypatch.setattr("tokenenv.tuning.search._LONG", 0.01)
    monkeypatch.setattr("tokenenv.measure.speed._SHORTEST", 0.01)
    monkeypatch.setattr(module, "words_for", lambda backbone: FEW)
    monkeypatch.setattr(Search, "rates", lambda self: ["diffrate:prune=2,merge=2"])


def tune(**more: Any) -> Any:
    return tokenenv.tune(**{"budget": 3.0, "batch": 16, "dtype": "float32", "limit": 300, **more})


@pytest.mark.usefixtures("few")
def test_from_end_to_end(capsys: pytest.CaptureFixture) -> None:
    command = (
        "tune --budget 3 --batch 16 --dtype float32 --limit 300 --method norm:keep=0.6 --out fast"
    )
    assert main(command.split()) == 0
    out = capsys.readouterr().out
    assert "120 images of digits:test choose, 180 verify" in out
    said = json.loads(Path("fast/tune.json").read_text())
    tried = {trial["what"]: trial for trial in said["tried"]}
    assert set(tried) >= {"keep-all", "norm:keep=0.6", "tome:r=6,shuffle=0"}
    assert tried["norm:keep=0.6"]["images"] == 120
    for row in said["rows"]:
        assert row["verified"]["images"] == 180
    assert Path("fast/tune.md").read_text().startswith("# digits_vit: at most 3 points, batch 16")
    assert Path("fast/tune.png").read_bytes().startswith(b"\x89PNG")
    if said["recommended"] is not None:  # on a busy machine nothing may be faster
        images = torch.randn(2, *tokenenv.load_compressed("fast").backbone.image_shape)
        assert tokenenv.load_compressed("fast")(images).shape == (2, 10)
        assert not Path("fast/.model").exists()


@pytest.mark.usefixtures("few")
def test_the_artefact_is_the_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock on which a method takes half the time, so that there is something to save."""
    quick = lambda runs, *rest, **more: {  # noqa: E731
        name: torch.tensor([1.0 if name in ("dense", "float32") else 0.5]).numpy() for name in runs
    }
    monkeypatch.setattr("tokenenv.tuning.search.in_turns", quick)
    monkeypatch.setattr("tokenenv.measure.speed.in_turns", lambda runs, *a, **m: {
        form: torch.tensor([1.0 if form.what == "dense" else 0.5]).numpy() for form in runs
    })  # fmt: skip
    found = tune(out="fast", methods=["tome:r=2"])
    assert found.recommended is not None and found.recommended.speed.speedup == 2.0
    model = tokenenv.load_compressed("fast")
    result = tokenenv.evaluate("fast").evaluation
    again = tokenenv.evaluate(found.recommended.what, model="digits_vit").evaluation
    assert torch.equal(result.reduced, again.reduced)
    assert model.backbone.architecture == "digits_vit"
    assert "take " in repr(found)


@pytest.mark.usefixtures("few")
def test_it_goes_on_after_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    extend, calls = Reference.extend, []

    def stopping(self: Reference, trial: Any, *rest: Any) -> Any:
        calls.append(trial.what)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return extend(self, trial, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Reference, "extend", stopping)
        with pytest.raises(KeyboardInterrupt, match="candidates tried so far: 2, kept in 'fast'"):
            tune(out="fast")
    kept = json.loads(Path("fast/search.json").read_text())["trials"]
    assert [trial["what"] for trial in kept] == calls[:2]
    seen = []

    def watching(self: Reference, trial: Any, candidate: Any, count: int, table: Any) -> Any:
        if count == 64:
            seen.append(trial.what)
        return extend(self, trial, candidate, count, table)

    monkeypatch.setattr(Reference, "extend", watching)
    tune(out="fast")
    assert calls[2] in seen and not set(seen) & set(calls[:2])
    with pytest.raises(UserError, match=r"has budget '3.0', not '2.0': give what it was started"):
        tune(out="fast", budget=2.0)


@pytest.mark.usefixtures("few")
def test_images_without_labels_lie_anywhere() -> None:
    write_digits(Path("images"), 200)
    (Path("images") / "more").mkdir()
    for number, file in enumerate(sorted(Path("images").rglob("*.png"))):
        file.rename(Path("images") / "more" / f"{number}.png")
    found = tune(data="images", unlabelled=True, only_methods=True, methods=["tome:r=8"])
    assert found.top1 == 100.0 and not found.labelled
    (trial,) = found.tried
    assert trial.wins == 0 and trial.losses == trial.images - trial.agree


@pytest.mark.parametrize("budget", [0.0, -1.0, 100.0, float("nan"), float("inf")])
def test_a_budget_out_of_range(budget: float) -> None:
    with pytest.raises(UserError, match="must be a number of percentage points above 0"):
        tune(budget=budget)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            {"budget": 0.2, "limit": None},
            r"600 images of 'digits:test' are too few for a budget of 0\.2 points",
        ),
        ({"limit": 20}, r"20 images .* too few .* at least 57 images or a larger budget"),
        ({"only_methods": True}, "leaves nothing to try"),
        ({"train": 60.0}, "train needs a folder"),
        ({"train": -1.0, "out": "fast"}, "must be seconds from 0 on"),
        ({"methods": ["nonsense:x=1"]}, "is neither a run folder nor a policy"),
        ({"batch": 0}, "batch"),
        ({"dtype": "int8"}, "int8"),
        ({"model": "resnet18", "data": "."}, "smaller images"),
        ({"data": "nowhere"}, "nowhere"),
        ({"device": "cuda:99"}, "cuda"),
    ],
)
def test_mistakes_are_told_in_one_line(words: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        tune(**words)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("few")
def test_a_device_that_fails_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a device named ``cpu:0``, which is none that the message takes for granted."""
    extend = Reference.extend

    def gone(self: Reference, trial: Any, *rest: Any) -> Any:
        if trial.what == "keep-all":
            raise RuntimeError("CUDA error: device is lost")
        return extend(self, trial, *rest)

    monkeypatch.setattr(Reference, "extend", gone)
    message = (
        r"device 'cpu:0' failed \(CUDA error: device is lost\); candidates tried so far: \d+, kept"
    )
    with pytest.raises(UserError, match=message):
        tune(out="fast", device="cpu:0")
    assert json.loads(Path("fast/search.json").read_text())["trials"]


def test_one_class_says_little() -> None:
    write_digits(Path("one"), 80, only="7")
    with pytest.raises(UserError, match="are of one class, on which top-1 says little"):
        tune(data="one")


def test_a_folder_of_something_else() -> None:
    Path("fast").mkdir()
    Path("fast/search.json").write_text('{"conditions": {}, "trials": [{"what": 3}]}')
    with pytest.raises(UserError, match=r"fast"):
        tune(out="fast")
    Path("file").write_text("")
    with pytest.raises(UserError, match="file"):
        tune(out="file")


@pytest.mark.parametrize(("word", "seconds"), [("90s", 90), ("15m", 900), ("1.5h", 5400)])
def test_durations(word: str, seconds: float) -> None:
    assert seconds_of(word) == seconds


@pytest.mark.parametrize("word", ["", "15", "m", "0m", "-3m", "15 m", "1d"])
def test_no_durations(word: str) -> None:
    with pytest.raises(UserError, match="is no duration above 0"):
        seconds_of(word)


@pytest.mark.usefixtures("few")
def test_nothing_of_somebody_elses_is_overwritten() -> None:
    Path("run").mkdir()
    Path("run/policy.safetensors").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"'run' holds 'policy\.safetensors', which is of no"):
        tune(out="run", methods=["tome:r=2"], only_methods=True)
    assert Path("run/policy.safetensors").read_bytes() == b"mine"


@pytest.mark.usefixtures("few")
def test_unreadable_images_do_not_count(capsys: pytest.CaptureFixture) -> None:
    write_digits(Path("photos"), 20)
    folder = sorted(Path("photos").iterdir())[0]
    for number in range(100):
        (folder / f"bad{number}.png").write_text("no image")
    with pytest.raises(UserError, match="are too few for a budget of 1 points"):
        tune(data="photos", budget=1.0, limit=None, methods=["tome:r=2"], only_methods=True)
    assert "skipped 100 unreadable images" in capsys.readouterr().out


@pytest.mark.usefixtures("few")
def test_a_model_of_other_classes_is_not_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reference, "top1", 9.0)
    with pytest.raises(UserError, match=r"9\.00 % top-1 on 'digits:test', about what guessing"):
        tune(methods=["tome:r=2"], only_methods=True)


@pytest.mark.usefixtures("few")
def test_a_model_says_its_method_and_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    test_the_artefact_is_the_candidate(monkeypatch)
    fast, said = tokenenv.load_compressed("fast"), json.loads(Path("fast/tune.json").read_text())
    assert fast.method == said["recommended"]
    row = next(row for row in said["rows"] if row["verified"]["what"] == fast.method)
    assert fast.measured["speed"][0]["speedup"] == row["speed"]["speedup"] == 2.0
    assert fast.measured["top1_lost_at_most"] == row["bound"]
    assert fast.measured["gmacs"] == pytest.approx(row["speed"]["gmacs"], rel=0.1)
    assert len(fast.measured["tokens"]) == fast.backbone.depth  # as ONNX files need them


@pytest.mark.usefixtures("few")
def test_what_is_recommended_no_more_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    test_the_artefact_is_the_candidate(monkeypatch)
    monkeypatch.setattr("tokenenv.measure.speed.in_turns", lambda runs, *a, **m: {
        form: torch.tensor([1.0]).numpy() for form in runs
    })  # fmt: skip
    assert tune(out="fast", methods=["keep-all"], only_methods=True).recommended is None
    assert not Path("fast/compressed.json").exists()
    assert Path("fast/search.json").exists()


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda said: said["found"].update(rates=5), "'rates' is 5"),
        (lambda said: said["found"].update(dtype="x"), "'dtype' is 'x'"),
        (lambda said: said["trials"][0].update(wins=10**6), "counts more images"),
    ],
)
def test_an_edited_search_is_refused(edit: Any, words: str) -> None:
    tune(out="fast", methods=["tome:r=2"], only_methods=True)
    said = json.loads(Path("fast/search.json").read_text())
    edit(said)
    Path("fast/search.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match=words):
        tune(out="fast", methods=["tome:r=2"], only_methods=True)


@pytest.mark.usefixtures("few")
def test_a_random_method_can_be_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenenv.measure.speed.in_turns", lambda runs, *a, **m: {
        form: torch.tensor([1.0 if form.what == "dense" else 0.5]).numpy() for form in runs
    })  # fmt: skip
    monkeypatch.setattr("tokenenv.tuning.search.in_turns", lambda runs, *a, **m: {
        name: torch.tensor([1.0 if name == "dense" else 0.5]).numpy() for name in runs
    })  # fmt: skip
    found = tune(out="fast", budget=30.0, methods=["random:keep=0.9"], only_methods=True)
    assert found.recommended is not None and found.recommended.what == "random:keep=0.9"
    assert tokenenv.load_compressed("fast").method == "random:keep=0.9"
