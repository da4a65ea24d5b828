"""What a comparison is made of: sweeps, paired intervals, areas, fronts, tables."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import source
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from PIL import Image
from scipy.stats import binomtest

from agents.policies.actor import ActorPolicy
from agents.policies.words import parse_policy
from tokenenv.errors import UserError
from tokenenv.game.figures import PALETTE, new_figure
from tokenenv.measure.classes import class_rows, classes_csv
from tokenenv.measure.comparison import (
    Comparison,
    Row,
    best_row,
    dense_exact_row,
    dense_row,
    expand,
    hypervolume,
    make_row,
    methods,
    pareto_front,
)
from tokenenv.measure.evaluation import Evaluation
from tokenenv.measure.latex import escaped
from tokenenv.measure.paired import Difference, images_needed, paired_difference
from tokenenv.measure.pareto import _draw_method, picture, swept
from tokenenv.measure.printing import print_result
from tokenenv.measure.speed import Speed


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("tome:r=4", ["tome:r=4"]),
        ("runs/dora-1", ["runs/dora-1"]),
        ("tome:r=4|8|12", ["tome:r=4", "tome:r=8", "tome:r=12"]),
        (
            "cls-attention:keep=0.9|0.7,blocks=3/6/9",
            ["cls-attention:keep=0.9,blocks=3/6/9", "cls-attention:keep=0.7,blocks=3/6/9"],
        ),
        ("a:x=1|2,y=3|4", ["a:x=1,y=3", "a:x=1,y=4", "a:x=2,y=3", "a:x=2,y=4"]),
        ("tome:r=4|4", ["tome:r=4", "tome:r=4"]),  # the command takes each once
        ("random:keep=0.5..0.9|0.7", ["random:keep=0.5..0.9", "random:keep=0.7"]),
    ],
)
def test_a_sweep_is_spelled_out(what: str, expected: list[str]) -> None:
    assert expand(what) == expected


@pytest.mark.parametrize("what", ["tome:r=4|", "tome:r=|4", "tome:r=4||8", "tome:4|8", "tome:=|"])
def test_a_sweep_without_a_value(what: str) -> None:
    with pytest.raises(UserError, match=r"lacks a value: a sweep has the form key=1\|2\|3"):
        expand(what)


def hits(both: int, wins: int, losses: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Two models' hits from the four counts of a table of pairs."""
    first = np.repeat([True, True, False, False], [both, wins, losses, neither])
    second = np.repeat([True, False, True, False], [both, wins, losses, neither])
    return first, second


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [  # Newcombe 1998, table III, method 10: 14 of 50 pairs, and tables with empty cells
        ((36, 12, 2, 0), 0.0569, 0.3404),
        ((20, 12, 2, 16), 0.0562, 0.3292),
        ((36, 14, 0, 0), 0.1528, 0.4167),
        ((54, 0, 0, 0), -0.0664, 0.0664),
        ((0, 29, 1, 0), 0.6666, 0.9882),
    ],
)
def test_the_interval_is_newcombes(table: tuple[int, ...], low: float, high: float) -> None:
    found = paired_difference(*hits(*table))
    assert (found.low, found.high) == pytest.approx((100 * low, 100 * high), abs=0.006)


@pytest.mark.parametrize("table", [(650, 30, 40, 180), (150, 20, 4, 26), (4000, 10, 10, 980)])
def test_the_interval_by_its_formula(table: tuple[int, ...]) -> None:
    """From scipy's score intervals and numpy's correlation, continuity-corrected."""
    first, second = hits(*table)
    n, half = len(first), len(first) / 2
    (l1, u1), (l2, u2) = (
        binomtest(int(each.sum()), n).proportion_ci(method="wilson") for each in (first, second)
    )
    p1, p2 = first.mean(), second.mean()
    joint = table[0] * table[3] - table[1] * table[2]
    phi = np.corrcoef(first, second)[0, 1] * (joint - half) / joint
    down = np.array([p1 - l1, -(u2 - p2)])
    up = np.array([u1 - p1, -(p2 - l2)])
    mix = np.array([[1, phi], [phi, 1]])
    found = paired_difference(first, second)
    assert found.mean == pytest.approx(100 * (p1 - p2))
    assert found.low == pytest.approx(100 * (p1 - p2 - np.sqrt(down @ mix @ down)))
    assert found.high == pytest.approx(100 * (p1 - p2 + np.sqrt(up @ mix @ up)))
    turned = paired_difference(second, first)
    assert tuple(-found) == pytest.approx(tuple(turned))


def test_the_interval_agrees_with_drawing_images() -> None:
    """Shares of right views, so that the differences take many values."""
    rng = np.random.default_rng(1)
    first, second = rng.integers(0, 6, 300) / 5, rng.integers(0, 5, 300) / 5
    found = paired_difference(first, second)
    drawn = rng.integers(0, 300, (20_000, 300))
    expected = np.percentile(100 * (first - second)[drawn].mean(1), [2.5, 97.5])
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.35)
    assert paired_difference(first, second) == found  # the same draws again


@pytest.mark.parametrize("n", [1, 40, 900])
@pytest.mark.parametrize("right", [0.0, 0.5, 1.0])
def test_no_difference_seen_is_no_proof_that_there_is_none(n: int, right: float) -> None:
    """The interval reaches half an image or more each way, for hits and for shares."""
    values = np.zeros(n, bool)
    values[: round(n * right)] = True
    for each in (values, values * 0.4):
        found = paired_difference(each, each)
        assert found.mean == 0 and found.low == pytest.approx(-found.high, rel=0.05)
        assert found.high > 50 / n


def test_the_images_that_a_precision_takes() -> None:
    """The interval of that many images of the same kind is as narrow as was asked."""
    first, second = hits(650, 30, 40, 180)
    times = images_needed(first, second) / len(first)
    found = paired_difference(*hits(*(round(count * times) for count in (650, 30, 40, 180))))
    assert (found.high - found.low) / 2 == pytest.approx(0.5, rel=0.03)
    assert images_needed(first, second, within=0.25) == pytest.approx(4 * 900 * times, rel=1e-3)
    none = np.ones(40, bool)
    assert images_needed(none, none) == pytest.approx((1.96 / 0.005) ** 2 * 2 / 42, rel=1e-3)


def test_a_change_has_its_sign() -> None:
    assert str(Difference(-0.5, -1.2, 0.2)) == "-0.50 [-1.20, +0.20]"
    assert str(-Difference(0.0, -1.0, 2.0)) == "+0.00 [-2.00, +1.00]"
    result = evaluation([1, 0, 0, 1, 1, 0])
    table = Comparison([dense_row(result), make_row("m:k=1", "m", False, result)], "m", "d", "")
    lost = table.rows[1]
    words = f"{-lost.lost:+.2f} [{-lost.lost_high:+.2f}, {-lost.lost_low:+.2f}]"
    lines = table.as_markdown().splitlines()
    assert any("`m:k=1`" in line and words in line for line in lines)
    assert any("`dense`" in line and "| - |" in line for line in lines)


def test_an_evaluation_says_how_sure_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    result = replace(evaluation([1, 0, 0, 1, 1, 0]), dense_seconds=1.0)
    print_result(source(), result)
    right, native = ((e == result.labels).numpy() for e in (result.reduced, result.dense))
    change = paired_difference(right, native)
    assert change.mean == pytest.approx(-200 / 6)
    count = images_needed(right, native)
    line = next(line for line in capsys.readouterr().out.splitlines() if "top-1 change" in line)
    assert f"{change} points" in line and f"+-0.5 points would take about {count:,} images" in line


def test_the_area_by_hand() -> None:
    """Floor 70: 40 wide up to 79, 30 up to 80, 10 up to 81; (20, 78) lies inside."""
    points = [(30.0, 80.0), (20.0, 78.0), (10.0, 81.0), (40.0, 79.0)]
    assert hypervolume(points, 80.0) == pytest.approx((40 * 9 + 30 * 1 + 10 * 1) / 10)
    assert hypervolume([(36.6, 80.0)], 80.0) == pytest.approx(36.6)  # for nothing
    assert hypervolume([(50.0, 70.0)], 80.0) == 0  # at the floor
    assert hypervolume([(50.0, 60.0)], 80.0) == 0  # below
    assert hypervolume([(-5.0, 80.0)], 80.0) == 0  # costs more than the dense model
    assert hypervolume([(0.0, 80.0)], 80.0) == 0  # the dense model itself
    assert hypervolume([], 80.0) == 0
    assert hypervolume([(50.0, 75.0)], 80.0, tolerated=20.0) == pytest.approx(50 * 15 / 20)


POINTS = st.lists(st.tuples(st.integers(-10, 110), st.integers(60, 90)), max_size=8)


@settings(max_examples=60, deadline=None)
@given(POINTS)
def test_the_area_counted_cell_by_cell(points: list[tuple[int, int]]) -> None:
    cells = sum(
        any(x < s and y < a for s, a in points) for x in range(0, 100) for y in range(70, 90)
    )
    assert hypervolume(points, 80.0) == pytest.approx(cells / 10)


def row(what: str, saved: float, top1: float, **changes: Any) -> Row:
    method = what.partition(":")[0]
    made = Row(what, method, True, 100, top1, 80 - top1, 79 - top1, 81 - top1, 95, 1, saved)
    return replace(made, gmacs=1 - saved / 100, **changes)


@settings(max_examples=60, deadline=None)
@given(POINTS)
def test_the_front_by_its_definition(points: list[tuple[int, int]]) -> None:
    rows = [row(f"m:n={i}", s, a) for i, (s, a) in enumerate(points)]
    expected = {
        r.what
        for r in rows
        if not any(
            o.saved >= r.saved and o.top1 >= r.top1 and (o.saved, o.top1) != (r.saved, r.top1)
            for o in rows
        )
    }
    front = pareto_front(rows)
    assert {r.what for r in front} == expected and len(front) == len(expected)
    assert [r.saved for r in front] == sorted(r.saved for r in front)


def test_the_best_row_loses_a_point_at_most() -> None:
    rows = [row("a", 10, 80), row("b", 30, 79), row("c", 40, 78.9)]
    best = best_row(rows)
    assert best is not None and best.what == "b"
    assert best_row(rows[2:]) is None


def test_methods_are_sorted_by_what_they_save() -> None:
    rows = [row("dense", 0, 80), row("t:r=8", 30, 78), row("n", 20, 79), row("t:r=4", 10, 80)]
    assert {name: [r.what for r in group] for name, group in methods(rows).items()} == {
        "t": ["t:r=4", "t:r=8"],
        "n": ["n"],
    }


def evaluation(reduced: list[int]) -> Evaluation:
    n = len(reduced)
    return Evaluation(
        labels=torch.tensor([1] * n),
        dense=torch.tensor([1] * (n - 1) + [0]),
        reduced=torch.tensor(reduced),
        losses=torch.zeros(n),
        macs=torch.tensor([1e9, 2e9] * (n // 2), dtype=torch.float64),
        executed=torch.tensor([0.9e9, 1.8e9] * (n // 2), dtype=torch.float64),
        lengths=torch.ones(n, 3),
        dense_macs=3e9,
        dense_executed=2.7e9,
        index=torch.arange(n),
        seconds=1.0,
        dense_seconds=None,
    )


def test_a_row_by_hand() -> None:
    result = evaluation([1, 0, 0, 1, 1, 0])
    found = make_row("m:k=1", "m", False, result)
    assert (found.images, found.frozen, found.gmacs, found.saved) == (6, False, 1.5, 50)
    assert found.top1 == pytest.approx(100 * 3 / 6)
    assert found.lost == pytest.approx(100 * (5 - 3) / 6)
    assert found.agreement == pytest.approx(100 * 4 / 6, abs=1e-3)
    assert found.lost_low < found.lost < found.lost_high
    dense = dense_row(result)
    assert (dense.gmacs, dense.saved, dense.lost) == (3, 0, 0)
    exact = dense_exact_row(result)
    assert (exact.what, exact.gmacs, exact.top1) == ("dense, exact", 2.7, dense.top1)
    assert exact.saved == pytest.approx(10)
    assert make_row("m:k=1", "m", False, result.as_executed()).gmacs == pytest.approx(1.35)
    assert dense.top1 == pytest.approx(100 * 5 / 6)


def speed(what: str, batch: int, rate: float) -> Speed:
    ratios = rate / 10, rate / 11, rate / 9
    return Speed(
        what, batch, "float32", False, rate, *ratios, 1.0, 1.0, 5.0, rate / 8, 0.8, compile_s=0.0
    )


def compared(timed: bool = True) -> Comparison:
    rows = [
        row("dense", 0, 80), row("tome:r=4", 20, 79), row("tome:r=8", 40, 78),
        row("runs/a|b", 30, 79.5, frozen=False),
    ]  # fmt: skip
    if timed:
        rows = [replace(r, speeds=(speed(r.what, 1, 10), speed(r.what, 8, 20))) for r in rows]
    return Comparison(rows, "a_vit", "pictures", "cpu" if timed else "")


def test_all_tables_say_the_same() -> None:
    found = compared()
    table = found.to_dict()
    assert [r["what"] for r in table["rows"]] == ["dense", "tome:r=4", "tome:r=8", "runs/a|b"]
    assert [r["pareto"] for r in table["rows"]] == [True, False, True, True]
    assert json.loads(json.dumps(table))["rows"][1]["speeds"][1]["images_per_s"] == 20
    assert table["hypervolume"]["reference"] == {"saved": 0, "top1": 70}
    assert table["hypervolume"]["percent"] == {
        "tome": pytest.approx((40 * 8 + 20 * 1) / 10), "runs/a|b": pytest.approx(30 * 9.5 / 10),
    }  # fmt: skip
    lines = list(csv.DictReader(io.StringIO(found.as_csv())))
    for line, own in zip(lines, table["rows"], strict=True):
        assert line["what"] == own["what"] and float(line["top1"]) == own["top1"]
        assert (line["frozen"], line["pareto"]) == (str(own["frozen"]), str(own["pareto"]))
        assert (line["images_per_s_b1"], line["images_per_s_b8"]) == ("10", "20")
    text = found.as_markdown()
    assert (
        "| `tome:r=8` | frozen | 78.00 | -2.00 [-3.00, -1.00] | 95.0 | - | 0.6000 | 40.0 | * |"
        in text
    )
    assert "| `runs/a\\|b` | fine-tuned | 79.50 |" in text
    assert "| `tome` | frozen | 2 | 34.00 |" in text
    assert "| `tome:r=4` | 8 | 20.0 | 2.00 [1.82, 2.22] | 5.0 | 80 |" in text
    assert "reference point: 0 % saved, top-1 70.00 %" in text
    for block in text.split("\n\n"):
        if block.startswith("|"):  # as many cells in every line
            cells = {line.replace("\\|", "").count("|") for line in block.splitlines()}
            assert len(cells) == 1


def test_before_the_times_are_there() -> None:
    found = compared(timed=False)
    assert "On the clock" not in found.as_markdown()
    assert "images_per_s_b1" not in found.as_csv()


@pytest.mark.parametrize("timed", [True, False])
def test_the_picture_is_not_blank(timed: bool) -> None:
    with Image.open(io.BytesIO(picture(compared(timed)))) as image:
        assert image.size == (1440, 672)
        halves = [
            np.asarray(image.convert("RGB"))[:, side] for side in np.split(np.arange(1440), 2)
        ]
    first = 255 * np.array(to_rgb(PALETTE[0]))  # the first method's colour
    for number, half in enumerate(halves):
        drawn = (np.abs(half - first).sum(-1) < 30).sum()
        assert (drawn > 100) == (timed or number == 0)


def test_a_long_title_stays_in_the_picture() -> None:
    found = replace(compared(True), timing="a machine with a long name, " * 12)
    with Image.open(io.BytesIO(picture(found))) as image:
        drawn = np.asarray(image.convert("L"))
    assert (drawn[:40, :6] == 255).all() and (drawn[:40, -6:] == 255).all()
    assert (drawn[:40] < 100).sum() > 500


def test_intervals_end_at_0_and_100_percent() -> None:
    axis = new_figure(4, 4).subplots()
    best = row("m:n=1", 10, 99.0, lost=-1.0, lost_low=-4.0, lost_high=2.0)
    worst = row("m:n=2", 20, 1.0, lost=97.0, lost_low=95.0, lost_high=99.0)
    _draw_method(axis, "m", [best, worst], [0.9, 0.8], "C0", "o")
    (bars,) = axis.collections
    assert [[y for _, y in segment] for segment in bars.get_segments()] == [
        [96.0, 100.0], [0.0, 3.0],
    ]  # fmt: skip


def test_what_tells_the_points_of_a_sweep_apart() -> None:
    assert swept(["t:r=4", "t:r=8"]) == ["r=4", "r=8"]
    assert swept(["c:keep=1,blocks=3", "c:keep=2,blocks=3"]) == ["keep=1", "keep=2"]
    assert swept(["c:keep=1,blocks=3", "c:keep=1,blocks=2"]) == ["blocks=3", "blocks=2"]
    assert swept(["run", "run:threshold=0.4"]) == ["", "threshold=0.4"]


def test_a_threshold_may_follow_what_was_learned() -> None:
    plain, set_ = (parse_policy(f"dora-deit_tiny{end}", 12) for end in ("", ":threshold=0.25"))
    assert isinstance(plain, ActorPolicy) and isinstance(set_, ActorPolicy)
    assert plain.threshold != set_.threshold == 0.25
    assert plain.rules == set_.rules


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("dora-deit_tiny:threshold=0", "threshold=0 is no probability"),
        ("dora-deit_tiny:threshold=nan", "threshold=nan is no probability"),
        ("dora-deit_tiny:threshold=x", "threshold=x is not a number"),
        ("dora-deit_tiny:r=8", "unknown argument 'r'"),
        ("dora-deit_tiny:threshold", "key=value"),
        ("nonsense:threshold=0.5", "is neither a run folder nor a policy"),
    ],
)
def test_thresholds_that_are_none(what: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_policy(what, 12)


def test_latex_prints_names_as_they_are() -> None:
    assert escaped(r"a_b%{x}\y|<c>") == (
        r"a\_b\%\{x\}\textbackslash{}y\textbar{}\textless{}c\textgreater{}"
    )


def test_classes_by_hand() -> None:
    labels, dense = torch.tensor([3, 3, 5, 3]), torch.tensor([3, 5, 5, 5])
    found = evaluation([3, 3, 3, 5])
    found = replace(found, labels=labels, dense=dense, reduced=torch.tensor([3, 3, 3, 5]))
    three, five = class_rows({"m": found}, lambda label: f"class {label}")
    assert (three.label, three.name, three.images) == (3, "class 3", 3)
    assert three.top1 == pytest.approx({"dense": 100 / 3, "m": 200 / 3}, abs=1e-3)
    assert five.top1 == {"dense": 100.0, "m": 0.0}
    assert classes_csv([three, five]).splitlines() == [
        "label,name,images,dense,m", "3,class 3,3,33.333,66.667", "5,class 5,1,100.0,0.0",
    ]  # fmt: skip
