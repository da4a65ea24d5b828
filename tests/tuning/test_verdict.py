"""What is recommended, and how sure it is said to be."""

from __future__ import annotations

import json
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from tokenenv.measure.certify import Pairs, p_value
from tokenenv.measure.speed import Speed
from tokenenv.tuning.picture import picture
from tokenenv.tuning.result import Tuned
from tokenenv.tuning.trials import Trial
from tokenenv.tuning.verdict import Row, bound_of, certify, recommend, sureness


def speed(what: str, factor: float, compiled: bool = False) -> Speed:
    return Speed(what, 8, "float32", compiled, 100 * factor, factor, factor - 0.1, factor + 0.1,
                 1.0, 1.2, 1.0, factor, 1.0, 0.0)  # fmt: skip


def seen(what: str, wins: int, losses: int, images: int = 2000) -> Trial:
    return Trial(what, images, 0.1, images - wins - losses, wins, losses, 2.0, 1.5)


def row(what: str, factor: float, wins: int, losses: int, certified: bool, n: int = 2000) -> Row:
    trial = seen(what, wins, losses, n)
    return Row(trial, 0.3, speed(what, factor), trial, certified, bound_of(trial, certified, 3))


def test_candidates_are_certified_in_order_until_one_fails() -> None:
    safe, bad, lucky = seen("safe", 5, 5), seen("bad", 5, 60), seen("lucky", 20, 1)
    assert certify([safe, bad, lucky], 1.0) == [True, False, False]
    assert certify([safe, lucky, bad], 1.0) == [True, True, False]
    assert certify([], 1.0) == []


def test_the_procedure_keeps_its_promise() -> None:
    """Five candidates that all lose more than the budget: one in twenty searches certifies any."""
    rng, budget, wrong = np.random.default_rng(0), 1.0, 0
    for _ in range(2000):
        drawn = rng.multinomial(1500, [0.02, 0.031, 0.949], size=5)
        trials = [seen(str(i), int(w), int(lost), 1500) for i, (w, lost, _) in enumerate(drawn)]
        wrong += any(certify(trials, budget))
    assert wrong / 2000 < 0.06


def test_the_fastest_certified_row_is_recommended() -> None:
    rows = [row("safe", 1.2, 5, 5, True), row("quick", 1.4, 5, 8, True),
            row("risky", 1.9, 30, 33, False), row("over", 2.5, 5, 60, False)]  # fmt: skip
    best, second = recommend(rows, 1.0)
    assert best is not None and best.what == "quick"
    assert second is not None and second.what == "risky"


def test_without_certainty_what_was_lost_decides() -> None:
    rows = [row("safe", 1.2, 5, 5, False), row("quick", 1.4, 5, 8, False),
            row("over", 2.5, 5, 60, False)]  # fmt: skip
    best, second = recommend(rows, 1.0)
    assert best is not None and best.what == "quick"
    assert second is not None and second.what == "safe"
    assert recommend([row("over", 2.5, 5, 60, False)], 1.0) == (None, None)
    assert recommend([row("slow", 0.9, 0, 0, True)], 1.0) == (None, None)


def test_a_bound_over_several_looks_is_wider() -> None:
    trial = seen("a", 20, 30)
    alone, among = bound_of(trial, True, 3), bound_of(trial, False, 3)
    assert trial.pairs.lost < alone < among
    assert p_value(trial.pairs, among) == pytest.approx(0.05 / 3, abs=1e-4)


def test_what_is_said_of_certainty() -> None:
    assert sureness(row("a", 1.2, 5, 5, True), 1.0, True).startswith("certified: it loses at most")
    few = sureness(row("a", 1.2, 3, 3, False, n=300), 0.5, True)
    assert "300 images can't certify 0.5 points for any method" in few
    assert "verifying images like these would certify 0.5" in few
    lost = sureness(row("a", 1.2, 5, 60, False), 0.5, False)
    assert "of the predictions" in lost and "no number of images certifies 0.5" in lost


def tuned(rows: tuple[Row, ...]) -> Tuned:
    tried = (*(r.trial for r in rows), Trial("other", 64, 0.5, 50, 1, 9, 1.3))
    return Tuned("m", "d", 1.0, 8, True, "float32", "a machine", (speed("dense", 1.0),), 90.0,
                 tried, {r.what: r.expected for r in rows}, rows)  # fmt: skip


def test_tables_json_and_picture() -> None:
    rows = (row("tome:r=4|8", 1.2, 5, 5, True), row("risky", 1.9, 30, 33, False))
    found = tuned(rows)
    text = found.as_markdown()
    assert "take tome:r=4|8 in float32: 1.20 x [1.10, 1.30]" in text
    assert "runner-up: risky" in text and "below 1.30" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines[:5]}) == 1  # a bar in a name opens no column
    said = json.loads(json.dumps(found.to_dict()))
    assert said["recommended"] == "tome:r=4|8" and said["runner_up"] == "risky"
    assert said["rows"][1]["certified"] is False
    assert "<td>recommended</td>" in found._repr_html_()
    with Image.open(BytesIO(picture(found))) as image:
        assert image.format == "PNG" and image.width > 800


def test_nothing_within_the_budget_is_said() -> None:
    found = tuned((row("over", 2.5, 5, 60, False),))
    assert found.recommended is None
    assert found.summary().startswith("nothing faster than the dense model (float32) was found")
    assert "the nearest is over" in found.summary()
    assert tuned(()).summary().endswith("loses at most 1 points")


def test_the_speed_over_the_given_precision_is_told() -> None:
    found = tuned((row("a", 1.2, 5, 5, True),))
    half = replace(found, dense=(replace(speed("dense", 0.5)), speed("dense", 1.0)))
    assert "2.40 x over dense in float32" in half.summary()
    assert Pairs(1, 2, 3).lost == pytest.approx(100 / 3)
