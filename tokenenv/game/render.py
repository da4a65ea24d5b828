"""Pictures and text of an image whose tokens are pruned or merged, decision by decision."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from tokenenv.data.pixels import Preprocess
from tokenenv.game.figures import new_figure

Pixels = NDArray[np.uint8]
"""``(H, W, 3)`` red, green and blue."""

_PANEL = 192  # a smaller image is shown at least this large, in pixels
_GAP = 10
_HEAD, _FOOT = 24, 22
PAPER, INK, _FAINT = (255, 255, 255), (32, 32, 32), (150, 150, 150)
BARS = ((0, 103, 163), (176, 71, 0))  # blue and vermilion: distinct to colour-blind people, too
_SAID = 0.65  # of these colours over an image, for what agents said
_GONE = np.array((220, 223, 228), np.uint8)  # a pruned token
_HATCH = np.array((165, 173, 186), np.uint8)  # lines over it: a kept token may be grey, too
_HATCH_STEP = 8  # pixels from line to line
_EMPTY = (244, 245, 247)  # a decision not yet taken
_EDGE = np.array((255, 140, 0), np.uint8)  # between merged tokens
_TINT = np.array((88, 28, 160), np.float64)  # over a merged token, the stronger the larger it is
_STRONGEST = 0.55  # of the tint, for a token of all patches
_PER_ROW = 7  # panels beside each other
_RIGHT, _WRONG = "#1a7f37", "#b3261e"

_SHADES = "░▒▓█"
_PRUNED = "·"
_TEXT_WIDTH = 120  # columns up to which a token gets two characters, which looks square


def to_pixels(image: Tensor, model: nn.Module) -> Pixels:
    """An image ``(C, H, W)`` that was normalised for a timm model, as ``(H, W, 3)`` uint8."""
    channels = Preprocess(model).pixels_of(image).numpy()
    if len(channels) == 1:
        channels = channels.repeat(3, axis=0)
    return channels.transpose(1, 2, 0)


def token_picture(
    pixels: Pixels,
    alive: NDArray[np.bool_],
    grid: tuple[int, int],
    blocks: Sequence[int],
    source: NDArray[np.int64] | None = None,
) -> Pixels:
    """The image, and one panel per decision block with the tokens after that decision.

    Pruned tokens are greyed out, merged ones shown in their mean colour.

    Args:
        pixels: ``(H, W, 3)`` the image; a tiny one is enlarged.
        alive: ``(T, P)`` whether each patch has a token after decision 0 to ``T - 1``.
        grid: rows and columns of tokens.
        blocks: the decision blocks; those from ``T`` on are left empty, so that all pictures of
            an episode have the same size.
        source: ``(T, P)`` the number of the token that stands for each patch; None if no tokens
            are merged.

    Returns:
        A picture ``(H', W', 3)`` with up to seven panels in a row.
    """
    large = enlarged(pixels)
    height, width = large.shape[:2]
    count = len(blocks) + 1
    rows, columns = -(-count // _PER_ROW), min(count, _PER_ROW)
    line = height + _HEAD + _FOOT
    sheet = Image.new("RGB", (columns * width + (columns + 1) * _GAP, rows * line), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    tokens = grid[0] * grid[1]
    for i in range(count):
        left = _GAP + i % _PER_ROW * (width + _GAP)
        top = i // _PER_ROW * line
        middle = left + width // 2
        taken = i <= len(alive)
        head = "image" if i == 0 else f"block {blocks[i - 1]}"
        draw.text((middle, top + _HEAD // 2), head, INK if taken else _FAINT, font, anchor="mm")
        top += _HEAD
        if not taken:
            draw.rectangle((left, top, left + width - 1, top + height - 1), fill=_EMPTY)
            continue
        panel, left_over = large, tokens
        if i and source is not None:
            panel, left_over = outlined(large, source[i - 1], grid), _distinct(source[i - 1])
        elif i:
            panel, left_over = greyed(large, alive[i - 1], grid), int(alive[i - 1].sum())
        sheet.paste(Image.fromarray(panel), (left, top))
        foot = f"{left_over} of {tokens} tokens"
        draw.text((middle, top + height + _FOOT // 2), foot, INK, font, anchor="mm")
    return np.asarray(sheet)


def token_text(
    pixels: Pixels,
    alive: NDArray[np.bool_],
    grid: tuple[int, int],
    blocks: Sequence[int],
    source: NDArray[np.int64] | None = None,
) -> str:
    """The same as text: characters show the brightness of tokens, a dot is a pruned token.

    A merged token has its patches' mean brightness. The arguments are those of
    :func:`token_picture`; decisions not yet taken are left out.
    """
    rows, columns = grid
    brightness = np.asarray(
        Image.fromarray(pixels).convert("L").resize((columns, rows), Image.Resampling.BOX)
    )
    panels, counts = [_shaded(brightness)], []
    for i, kept in enumerate(alive):
        shown = brightness if source is None else group_means(brightness, source[i], grid)
        panels.append(np.where(kept.reshape(grid), _shaded(shown), _PRUNED))
        counts.append(int(kept.sum()) if source is None else _distinct(source[i]))
    heads = ["image", *(f"block {b}: {n}" for b, n in zip(blocks, counts, strict=False))]
    repeat = 2 if len(panels) * (2 * columns + 2) <= _TEXT_WIDTH else 1
    width = max(repeat * columns, *map(len, heads))
    lines = ["  ".join(head.ljust(width) for head in heads)]
    for row in range(rows):
        drawn = ("".join(c * repeat for c in panel[row]) for panel in panels)
        lines.append("  ".join(line.ljust(width) for line in drawn))
    return "\n".join(line.rstrip() for line in lines)


@dataclass(frozen=True)
class TokenRow:
    """One image of :func:`save_token_pictures`.

    Attributes:
        pixels: ``(H, W, 3)`` the image.
        source: ``(T, P)`` the number of the token that stands for each patch after each decision,
            -1 for a pruned patch.
        label: name of the true class.
        dense: name of the class that the dense model predicts.
        reduced: name of the class predicted from the tokens left.
    """

    pixels: Pixels
    source: NDArray[np.int64]
    label: str
    dense: str
    reduced: str


def save_token_pictures(
    path: str | os.PathLike[str],
    rows: Sequence[TokenRow],
    grid: tuple[int, int],
    blocks: Sequence[int],
    *,
    merging: bool = False,
) -> None:
    """Write a picture file with one row per image and one column per decision block.

    Args:
        path: the file; matplotlib knows its format from the suffix, such as ``.png``.
        rows: the images, at least one.
        grid: rows and columns of tokens.
        blocks: the decision blocks, as many as decisions in every row.
        merging: as for :func:`reduced`.
    """
    columns = len(blocks) + 1
    figure = new_figure(1.7 * columns + 1.6, 1.95 * len(rows) + 0.3)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    heads = ["image", *(f"block {block}" for block in blocks)]
    for line, row in zip(axes, rows, strict=True):
        large = enlarged(row.pixels)
        panels = [large]
        panels += [reduced(large, source, grid, merging=merging) for source in row.source]
        for i, (axis, panel) in enumerate(zip(line, panels, strict=True)):
            axis.imshow(panel, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if i:
                axis.set_xlabel(f"{_distinct(row.source[i - 1])} tokens", fontsize=9)
        caption = f"true: {row.label}\ndense: {row.dense}\nreduced: {row.reduced}"
        line[0].set_ylabel(
            caption,
            rotation=0,
            ha="right",
            va="center",
            fontsize=9,
            color=_RIGHT if row.reduced == row.label else _WRONG,
        )
    for axis, head in zip(axes[0], heads, strict=True):
        axis.set_title(head, fontsize=10)
    figure.savefig(path, dpi=120)


def reduced(
    pixels: Pixels, source: NDArray[np.int64], grid: tuple[int, int], *, merging: bool
) -> Pixels:
    """The image ``(H, W, 3)`` after a decision: pruned patches greyed, merged tokens outlined.

    Args:
        pixels: the image.
        source: ``(P,)`` the number of the token that stands for each patch, -1 for a pruned patch.
        grid: rows and columns of tokens.
        merging: whether to outline merged tokens, give them their mean colour, and shade them by
            the number of their patches.
    """
    drawn = outlined(shaded(pixels, source, grid), source, grid) if merging else pixels
    return greyed(drawn, source >= 0, grid)


def greyed(pixels: Pixels, alive: NDArray[np.bool_], grid: tuple[int, int]) -> Pixels:
    """The image ``(H, W, 3)`` with its pruned tokens, not ``alive (P,)``, hatched grey."""
    height, width = pixels.shape[:2]
    shown = _spread(alive, grid, (height, width))[..., None]
    line = (np.arange(height)[:, None] + np.arange(width)) % _HATCH_STEP == 0
    return np.where(shown, pixels, np.where(line[..., None], _HATCH, _GONE))


def outlined(pixels: Pixels, source: NDArray[np.int64], grid: tuple[int, int]) -> Pixels:
    """The image ``(H, W, 3)`` with merged tokens in their mean colour and a line around them.

    ``source``: ``(P,)`` the number of the token that stands for each patch.
    """
    _, number, patches = np.unique(source, return_inverse=True, return_counts=True)
    several = _spread(patches[number.reshape(-1)] > 1, grid, pixels.shape[:2])
    token = _spread(source, grid, pixels.shape[:2])
    shown = group_means(pixels, source, grid)
    edge = np.zeros(token.shape, bool)
    edge[1:] |= (token[1:] != token[:-1]) & (several[1:] | several[:-1])
    edge[:, 1:] |= (token[:, 1:] != token[:, :-1]) & (several[:, 1:] | several[:, :-1])
    return np.where(edge[..., None], _EDGE, shown)


def shaded(pixels: Pixels, source: NDArray[np.int64], grid: tuple[int, int]) -> Pixels:
    """The image ``(H, W, 3)`` with a tint over merged tokens that rises with the log of their size.

    A token of a single patch has none. ``source``: ``(P,)`` as for :func:`reduced`.
    """
    _, token, patches = np.unique(source, return_inverse=True, return_counts=True)
    size = np.where(source >= 0, patches[token.reshape(-1)], 1)
    depth = _STRONGEST * np.log(size) / max(np.log(len(source)), 1)
    over = _spread(depth, grid, pixels.shape[:2])[..., None]
    return ((1 - over) * pixels + over * _TINT).round().astype(np.uint8)


def tinted(pixels: Pixels, chance: NDArray[np.float32], grid: tuple[int, int]) -> Pixels:
    """The image ``(H, W, 3)`` under colours from blue, 0, over white to vermilion, 1.

    ``chance``: ``(P,)``; patches where it is NaN are left as they are.
    """
    low, high = (np.array(colour, np.float64) for colour in BARS)
    share = np.nan_to_num(np.abs(2 * chance - 1))[:, None]
    colours = 255 + share * (np.where(chance[:, None] > 0.5, high, low) - 255)
    spread = np.stack([_spread(part, grid, pixels.shape[:2]) for part in colours.T], 2)
    acted = _SAID * _spread(~np.isnan(chance), grid, pixels.shape[:2])[..., None]
    return ((1 - acted) * pixels + acted * spread).round().astype(np.uint8)


def group_means(
    pixels: NDArray[np.uint8], source: NDArray[np.int64], grid: tuple[int, int]
) -> NDArray[np.uint8]:
    """``pixels`` ``(H, W, ...)``, each token of several patches filled with its mean."""
    shown = pixels.copy()
    token = _spread(source, grid, pixels.shape[:2])
    for number, patches in zip(*np.unique(source, return_counts=True), strict=True):
        if patches > 1:
            inside = token == number
            shown[inside] = pixels[inside].mean(axis=0).round().astype(np.uint8)
    return shown


def _spread(values: NDArray[Any], grid: tuple[int, int], size: tuple[int, ...]) -> NDArray[Any]:
    """Values ``(P,)`` of patches repeated for their pixels: ``(H, W)``."""
    row = np.arange(size[0]) * grid[0] // size[0]
    column = np.arange(size[1]) * grid[1] // size[1]
    spread: NDArray[Any] = values.reshape(grid)[row[:, None], column[None, :]]
    return spread


def _distinct(source: NDArray[np.int64]) -> int:
    return len(np.unique(source[source >= 0]))


def _shaded(brightness: NDArray[np.uint8]) -> NDArray[np.str_]:
    return np.array(list(_SHADES))[brightness // 64]


def enlarged(pixels: Pixels) -> Pixels:
    """The image enlarged by an integer factor if its larger side is below :data:`_PANEL`."""
    factor = max(1, -(-_PANEL // max(pixels.shape[:2])))
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)
