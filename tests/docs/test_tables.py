"""Tables and pictures of measured figures are those that the stored figures give."""

from __future__ import annotations

import re
from typing import Any

import pytest
from matplotlib.text import Text
from PIL import Image
from site_modules import DOCS, site_module

measured, plots = site_module("measured"), site_module("plots")


@pytest.mark.parametrize("page", measured.PAGES, ids=lambda page: page.name)
def test_a_pages_tables_are_those_of_the_stored_figures(page: Any) -> None:
    text = page.read_text(encoding="utf-8")
    assert text == measured.filled(text), "run python docs/pictures.py"


def test_every_table_stands_on_a_page_and_names_a_picture() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in measured.PAGES)
    marks = re.findall(r"^<!-- table (\w+): python docs/pictures\.py (\w+) -->$", text, re.M)
    assert sorted(name for name, _ in marks) == sorted(measured.TABLES)
    assert {picture for _, picture in marks} == set(plots.PLOTS)
    assert text.count("<!-- end -->") == len(marks)


@pytest.mark.parametrize("picture", plots.PLOTS)
def test_a_picture_is_drawn_from_the_stored_figures(picture: str) -> None:
    with Image.open(DOCS / f"pictures/{picture}.png") as image:
        assert image.text[plots.MADE_OF] == measured.digest(picture)  # type: ignore[attr-defined]
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)  # legible on dark pages


def boxes(figure: Any) -> list[Any]:
    """Where the texts of a figure are drawn; ticks beyond an axis' ends are not."""
    figure.canvas.draw()
    undrawn = {
        id(tick.label1)
        for panel in figure.axes
        for axis in (panel.xaxis, panel.yaxis)
        for tick in axis.get_major_ticks()
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    }
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    return [text.get_window_extent() for text in texts if id(text) not in undrawn]


@pytest.mark.parametrize("picture", plots.PLOTS)
def test_no_text_overlaps_or_is_cut_off_and_axes_are_labelled(picture: str) -> None:
    figure = plots.PLOTS[picture]()
    found = boxes(figure)
    assert len(found) > 10
    for number, box in enumerate(found):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, box
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, box
        assert not any(box.overlaps(other) for other in found[number + 1 :])
    labelled = bool(figure.get_supxlabel())
    assert labelled or all(axis.get_xlabel() and axis.get_ylabel() for axis in figure.axes)


def test_a_changed_figure_changes_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    before = measured.scenes(), measured.scenes_short()
    changed = measured.read("scenes")
    changed["rows"][0]["top1"][0] -= 1
    monkeypatch.setattr(measured, "read", lambda name: changed)
    assert measured.scenes() != before[0] and measured.scenes_short() != before[1]


def test_intervals_hold_what_they_are_intervals_of() -> None:
    for row in measured.read("deit_tiny")["rows"]:
        assert row["low"] <= row["lost"] <= row["high"], row
    for name in ("deit_tiny_speed", "deit_small_speed"):
        for row in measured.read(name):
            assert row["speedup_q25"] <= row["speedup"] <= row["speedup_q75"], row
