"""A sheet that shows, block by block, what methods make of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tokenenv.game.animation import Guess, draw_guesses, fitting
from tokenenv.game.render import BARS, INK, PAPER, Pixels

_GAP, _LINE = 14, 20
_PER_ROW = 7  # panels beside each other
_GUESS_WIDTH = 330
_RULE = (205, 209, 216)
_SOFT = (84, 90, 100)


@dataclass(frozen=True)
class Strip:
    """One method on one image.

    Attributes:
        title: the method.
        line: how much of tokens, multiply-adds and time is left in the end.
        panels: ``(H, W, 3)`` pictures of one size: the image, then one for each decision.
        captions: two short lines below each of them.
        guesses: classes seen with the tokens that are left in the end.
    """

    title: str
    line: str
    panels: Sequence[Pixels]
    captions: Sequence[tuple[str, str]]
    guesses: Sequence[Guess]


def draw_sheet(title: str, dense: Sequence[Guess], strips: Sequence[Strip]) -> Pixels:
    """The sheet ``(H, W, 3)`` of one image.

    Args:
        title: what the image is.
        dense: the most probable classes of the dense model.
        strips: at least one method; all panels have one size.
    """
    height, width = strips[0].panels[0].shape[:2]
    columns = min(_PER_ROW, max(len(strip.panels) for strip in strips))
    wide = max(columns * (width + _GAP) + _GAP, 2 * (_GUESS_WIDTH + _GAP) + _GAP)
    bars = (1 + max(len(guesses) for guesses in (dense, *(s.guesses for s in strips)))) * _LINE
    heights = [_height(strip, height, columns) for strip in strips]
    tall = _GAP + 2 * _LINE + bars + sum(each + 2 * _GAP for each in heights)
    sheet = Image.new("RGB", (wide, tall), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _GAP), fitting(title, _font(17), wide - 2 * _GAP), INK, _font(17))
    top = _GAP + _LINE + _LINE // 2
    draw_guesses(draw, "dense model", dense, BARS[0], (_GAP, top), _GUESS_WIDTH)
    top += bars + _GAP // 2
    for strip, tall in zip(strips, heights, strict=True):
        draw.line((_GAP, top, wide - _GAP, top), _RULE)
        _draw_strip(sheet, draw, strip, columns, top + _GAP)
        top += tall + 2 * _GAP
    return np.asarray(sheet)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _height(strip: Strip, height: int, columns: int) -> int:
    rows = -(-len(strip.panels) // columns)
    return (3 + len(strip.guesses)) * _LINE + rows * (height + 2 * _LINE + _GAP)


def _draw_strip(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, strip: Strip, columns: int, top: int
) -> None:
    room = sheet.width - 2 * _GAP
    draw.text((_GAP, top), fitting(strip.title, _font(17), room), INK, _font(17))
    draw.text((_GAP, top + _LINE + 4), fitting(strip.line, _font(14), room), _SOFT, _font(14))
    top += 2 * _LINE + 4
    head = "with the tokens left"
    top = draw_guesses(draw, head, strip.guesses, BARS[1], (_GAP, top), _GUESS_WIDTH) + _GAP // 2
    height, width = strip.panels[0].shape[:2]
    for number, (panel, lines) in enumerate(zip(strip.panels, strip.captions, strict=True)):
        left = _GAP + number % columns * (width + _GAP)
        high = top + number // columns * (height + 2 * _LINE + _GAP)
        sheet.paste(Image.fromarray(panel), (left, high))
        for line, text in enumerate(lines):
            place = (left + width // 2, high + height + line * _LINE + _LINE // 2)
            colour = _SOFT if line else INK
            draw.text(place, fitting(text, _font(13), width), colour, _font(13), anchor="mm")
