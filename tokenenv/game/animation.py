"""Frames of an animation that shows how an image loses its tokens, and the GIF they make."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tokenenv.errors import UserError
from tokenenv.game.render import INK, PAPER, Pixels, enlarged, reduced
from tokenenv.storage import write_bytes

_WIDTH = 320  # of a panel at least, which its text needs
_GAP = 12
_LINE = 20  # height of a line of text
_BAR = 110  # length of the bar of a probability of 1
BARS = ((0, 103, 163), (176, 71, 0))  # blue and vermilion: distinct to colour-blind people, too
_MILLISECONDS, _LAST = 1200, 2600  # how long a frame stays, and the last one of an image

Guess = tuple[str, float]
"""Name of a class and its probability."""


@dataclass(frozen=True)
class Panel:
    """What a frame shows of one image under one method.

    Attributes:
        heads: lines above the image.
        pixels: ``(H, W, 3)`` the image; a tiny one is enlarged.
        source: ``(P,)`` the number of the token that stands for each patch, -1 for a pruned one.
        merging: whether the method merges tokens.
        feet: lines below the image.
        guesses: titles, each with its most probable classes.
    """

    heads: Sequence[str]
    pixels: Pixels
    source: NDArray[np.int64]
    merging: bool
    feet: Sequence[str]
    guesses: Sequence[tuple[str, Sequence[Guess]]]


def draw_frame(panels: Sequence[Panel], grid: tuple[int, int]) -> Pixels:
    """One frame ``(H', W', 3)``: panels of images of one size beside each other.

    Args:
        panels: at least one; all with as many lines of each kind.
        grid: rows and columns of tokens.
    """
    first = panels[0]
    height, width = enlarged(first.pixels).shape[:2]
    width = max(width, _WIDTH)
    lines = len(first.heads) + len(first.feet) + sum(1 + len(g) for _, g in first.guesses)
    size = (len(panels) * (width + _GAP) + _GAP, lines * _LINE + height + 3 * _GAP)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, panel in enumerate(panels):
        _draw_panel(sheet, draw, panel, grid, _GAP + number * (width + _GAP), width)
    return np.asarray(sheet)


def _draw_panel(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    panel: Panel,
    grid: tuple[int, int],
    left: int,
    width: int,
) -> None:
    font = ImageFont.load_default(14)
    top = _GAP // 2
    for line in panel.heads:
        draw.text((left, top), fitting(line, font, width), INK, font)
        top += _LINE
    large = enlarged(panel.pixels)
    drawn = reduced(large, panel.source, grid, merging=panel.merging)
    sheet.paste(Image.fromarray(drawn), (left, top + _GAP // 2))
    top += len(large) + _GAP
    for line in panel.feet:
        draw.text((left, top), fitting(line, font, width), INK, font)
        top += _LINE
    for (title, guesses), colour in zip(panel.guesses, BARS, strict=False):
        top = draw_guesses(draw, title, guesses, colour, (left, top), width)


def draw_guesses(
    draw: ImageDraw.ImageDraw,
    title: str,
    guesses: Sequence[Guess],
    colour: tuple[int, int, int],
    place: tuple[int, int],
    width: int,
) -> int:
    """Write a title, and below it a bar for each class; returns where the next line starts.

    ``place``: left and top, pixels.
    """
    font = ImageFont.load_default(14)
    left, top = place
    draw.text((left, top), fitting(title, font, width), colour, font)
    for name, probability in guesses:
        top += _LINE
        bar = round(_BAR * probability)
        draw.rectangle((left, top + 4, left + bar, top + _LINE - 6), fill=colour)
        percent = left + _BAR + 52
        draw.text((percent, top), f"{100 * probability:.1f} %", INK, font, anchor="ra")
        name = fitting(name, font, width - _BAR - 62)
        draw.text((percent + 10, top), name, INK, font)
    return top + _LINE


def fitting(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The line, cut off with dots where it is wider than ``width`` pixels."""
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(f"{line}...") > width:
        line = line[:-1]
    return f"{line.rstrip()}..."


def check_gif(path: Path) -> None:
    """Raise :class:`UserError` unless the file's suffix is ``.gif``."""
    if path.suffix.lower() != ".gif":
        raise UserError(f"'{path}' does not end with .gif: give a name such as episode.gif")


def save_gif(path: Path, episodes: Sequence[Sequence[Pixels]]) -> None:
    """Write an animation that repeats forever, atomically.

    Args:
        path: the file.
        episodes: the frames of each image, all of one size.

    Raises:
        UserError: the suffix is another than ``.gif``, or the file can't be written.
    """
    check_gif(path)
    frames = [
        Image.fromarray(frame).quantize(dither=Image.Dither.NONE)
        for episode in episodes
        for frame in episode
    ]
    stay = [
        _LAST if step == len(episode) - 1 else _MILLISECONDS
        for episode in episodes
        for step in range(len(episode))
    ]
    content = io.BytesIO()
    frames[0].save(
        content, "GIF", save_all=True, append_images=frames[1:], duration=stay, loop=0, disposal=1
    )
    write_bytes(path, content.getvalue())
