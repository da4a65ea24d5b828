"""What training adds on the scenes, and that the report and the picture say so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tokenenv
import tokenenv.data.scenes
from agents.training import Run
from agents.training.judgement import Judgement
from agents.training.plots import plot_history
from tokenenv.measure import evaluation

pytestmark = pytest.mark.usefixtures("elsewhere", "one_thread")


def judged(run: Run) -> list[dict[str, float]]:
    return [row for row in run.report["history"] if "saving" in row]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Without a system's or a model's name, a sixth of the updates."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokenenv.data.scenes.COUNTS", {"train": 1000, "validation": 9, "test": 300})
        tokenenv.data.scenes.data_set.cache_clear()
        out = tmp_path_factory.mktemp("scenes") / "run"
        found = tokenenv.train(out=out, updates=12, evaluate_every=6, calibrate=5)
        tokenenv.data.scenes.data_set.cache_clear()
    return found


def test_a_short_training_shows(run: Run) -> None:
    assert run.config["system"] == "rl4evit" and run.config["model"] == "scenes_vit"
    first, *_, last = judged(run)
    assert abs(first["saving"] - run.config["target_saving"]) < 6
    assert first["drop"] > 6  # it starts visibly below the goal
    assert last["drop"] < 0.75 * first["drop"]
    assert last["saving"] > first["saving"] - 6
    assert run.report["data"] == "scenes:test" and run.report["top1_dense"] > 90


def test_the_report_says_what_the_untrained_start_does(run: Run) -> None:
    report, before = run.report, run.report["untrained"]
    assert set(before) == {"top1", "gmacs"}
    assert abs(before["gmacs"] / report["gmacs"] - 1) < 0.15  # at about the same cost
    assert report["top1"] > before["top1"] + 2
    assert json.loads((run.folder / "report.json").read_text())["untrained"] == before


def test_the_untrained_policy_is_the_one_that_training_started_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its evaluation is of a policy whose weights no update has touched."""
    seen: list[dict[str, Any]] = []
    whole = evaluation.evaluate

    def noted(backbone: Any, policy: Any, *args: Any, **options: Any) -> Any:
        seen.append({name: tensor.clone() for name, tensor in policy.state_dict().items()})
        return whole(backbone, policy, *args, **options)

    monkeypatch.setattr("tokenenv.measure.printing.evaluate", noted)
    tokenenv.train(
        "rl4evit", model="digits_vit", out="r", seed=3, images=60, updates=2, evaluate_every=1,
        batch=8, hidden=[8], epochs=1, minibatches=1, calibrate=2, blocks=(1, 4),
    )  # fmt: skip
    trained, start = seen
    assert start["skip.weight"].abs().sum() == 0  # as an untrained policy has it
    assert trained["skip.weight"].abs().sum() > 0


def test_what_is_trained_where_something_is_named() -> None:
    tiny: dict[str, Any] = {
        "images": 40, "updates": 1, "evaluate_every": 1, "batch": 8, "hidden": [8], "epochs": 1,
        "minibatches": 1, "calibrate": 1, "blocks": (1,),
    }  # fmt: skip
    named = tokenenv.train("rl4evit", out="a", **tiny).config
    assert (named["model"], named["data"]) == ("digits_vit", "digits:train")
    other = tokenenv.train(data="digits", out="b", **tiny).config
    assert (other["system"], other["model"]) == ("rl4evit", "digits_vit")


def test_the_curve_shows_where_the_untrained_start_is(tmp_path: Path) -> None:
    """The lines, the title, the labels and the legends that the picture is drawn with."""
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    history: list[dict[str, Any]] = [
        {"update": 0, "saving": 60.0, "drop": 30.0},
        {"update": 1, "reward": 0.5, "keep": 0.6},
        {"update": 1, "saving": 61.0, "drop": 5.0},
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, *args, **options: drawn.append(self))
        for before in (Judgement(60.5, 1.0, 29.0), None):
            plot_history(tmp_path / "c.png", history, 60.0, title="a on b", untrained=before)
    with_start, without = drawn
    assert with_start.get_suptitle() == "a on b"
    saved, lost = with_start.axes[2:]
    for axis, value in ((saved, 60.5), (lost, 29.0)):
        lines = {line.get_label(): list(line.get_ydata()) for line in axis.get_lines()}
        assert lines["untrained, at the final saving"] == [value, value]
        assert [text.get_text() for text in axis.get_legend().get_texts()] == list(lines)
    assert all(axis.get_ylabel() and axis.get_title() for axis in with_start.axes)
    assert lost.get_xlabel() == "update"
    assert len(without.axes[3].get_lines()) == 1
