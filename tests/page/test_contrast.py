"""Colours of pages and of pictures have the contrast of WCAG AA, light and dark."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from contrasts import GRAPHICS, TEXT, contrast, from_hex

import tokenenv
from tokenenv.game.figures import PALETTE, line_colour
from tokenenv.game.render import BARS, INK, PAPER

STYLE = (Path(tokenenv.__file__).parent / "page/assets/page.css").read_text(encoding="utf-8")
GROUNDS = ("--paper", "--card", "--accent-soft")
ON_ACCENT = "--accent-ink"
NOT_COLOURS_OF_MARKS = (*GROUNDS, "--line", ON_ACCENT)
"""Grounds; lines between things, which tell nothing; and what stands on the accent alone."""


def schemes() -> dict[str, dict[str, str]]:
    """The variables of the light scheme, and of the dark one."""
    light, dark = re.findall(r":root \{(.*?)\}", STYLE, re.S)
    read = (dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6});", text)) for text in (light, dark))
    return dict(zip(("light", "dark"), read, strict=True))


def used_for(property: str) -> set[str]:
    """The variables that the style gives to a property."""
    return set(re.findall(rf"(?:^|[\s{{;]){property}: var\((--[\w-]+)\)", STYLE))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_on_every_ground_it_may_stand_on(scheme: str) -> None:
    colours = schemes()[scheme]
    texts = used_for("color") | {"--soft"}  # the charts' labels are filled with it
    assert {"--ink", "--soft", "--accent", "--good", "--bad", "--dense", "--reduced"} <= texts
    poor = {
        (text, ground): round(ratio, 2)
        for text in texts - {ON_ACCENT}
        for ground in GROUNDS
        if (ratio := contrast(from_hex(colours[text]), from_hex(colours[ground]))) < TEXT
    }
    assert poor == {}
    assert contrast(from_hex(colours[ON_ACCENT]), from_hex(colours["--accent"])) >= TEXT


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_marks_lines_and_bars(scheme: str) -> None:
    colours = schemes()[scheme]
    marks = set(colours) - set(NOT_COLOURS_OF_MARKS)
    assert {f"--c{i}" for i in range(8)} <= marks
    poor = {
        (mark, ground): round(ratio, 2)
        for mark in marks
        for ground in ("--paper", "--card")
        if (ratio := contrast(from_hex(colours[mark]), from_hex(colours[ground]))) < GRAPHICS
    }
    assert poor == {}


def test_both_schemes_have_the_same_variables_and_each_is_defined() -> None:
    light, dark = schemes().values()
    assert set(light) == set(dark) and len(light) > 15
    assert set(re.findall(r"var\((--[\w-]+)\)", STYLE)) <= set(light)


def test_pictures_are_drawn_in_the_colours_of_the_page() -> None:
    light = schemes()["light"]
    assert list(PALETTE) == [light[f"--c{i}"] for i in range(8)]
    assert min(contrast(from_hex(colour), from_hex("#ffffff")) for colour in PALETTE) >= TEXT
    assert [line_colour(i) for i in (0, 7, 8)] == [PALETTE[0], PALETTE[7], PALETTE[0]]


def test_animations_and_sheets() -> None:
    paper, ink = (tuple(v / 255 for v in colour) for colour in (PAPER, INK))
    assert contrast(ink, paper) >= TEXT
    bars = [tuple(v / 255 for v in bar) for bar in BARS]  # of the titles above them, too
    assert bars == [from_hex(schemes()["light"][name]) for name in ("--dense", "--reduced")]
    assert min(contrast(bar, paper) for bar in bars) >= TEXT
