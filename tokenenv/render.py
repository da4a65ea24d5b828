"""Pictures and text of an image whose tokens are pruned, decision by decision."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

Pixels = NDArray[np.uint8]
"""``(H, W, 3)`` red, green and blue."""

_PANEL = 192  # a smaller image is shown at least this large, in pixels
_GAP = 10
_HEAD, _FOOT = 24, 22
_PAPER, _INK, _FAINT = (255, 255, 255), (32, 32, 32), (150, 150, 150)
_GONE = np.array((220, 223, 228), np.uint8)  # a pruned token
_HATCH = np.array((165, 173, 186), np.uint8)  # lines over it: a living token may be grey too
_HATCH_STEP = 8  # pixels from line to line
_EMPTY = (244, 245, 247)  # a decision not yet taken
_RIGHT, _WRONG = "#1a7f37", "#b3261e"

_SHADES = "░▒▓█"
_PRUNED = "·"
_TEXT_WIDTH = 120  # columns up to which a token gets two characters, which looks square


def to_pixels(image: Tensor, model: nn.Module) -> Pixels:
    """An image ``(C, H, W)`` normalised for a timm model, as the model's user would see it."""
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(model)
    mean, std = (np.array(config[key], np.float32)[:, None, None] for key in ("mean", "std"))
    levels = (image.float().cpu().numpy() * std + mean) * 255
    channels = levels.round().clip(0, 255).astype(np.uint8)
    if len(channels) == 1:
        channels = channels.repeat(3, axis=0)
    return channels.transpose(1, 2, 0)


def token_picture(
    pixels: Pixels, alive: NDArray[np.bool_], grid: tuple[int, int], blocks: Sequence[int]
) -> Pixels:
    """The image, and one panel per decision block with the pruned tokens greyed out.

    Args:
        pixels: ``(H, W, 3)`` the image; a tiny one is enlarged.
        alive: ``(T, P)`` whether each token is alive after decision 0 to ``T - 1``.
        grid: rows and columns of tokens.
        blocks: the decision blocks; those from ``T`` on are left empty, so that all pictures of
            an episode have the same size.

    Returns:
        A picture ``(H', W', 3)``.
    """
    large = _enlarged(pixels)
    height, width = large.shape[:2]
    count = len(blocks) + 1
    size = (count * width + (count + 1) * _GAP, height + _HEAD + _FOOT)
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    tokens = grid[0] * grid[1]
    for i in range(count):
        left = _GAP + i * (width + _GAP)
        middle = left + width // 2
        taken = i <= len(alive)
        head = "image" if i == 0 else f"block {blocks[i - 1]}"
        draw.text((middle, _HEAD // 2), head, _INK if taken else _FAINT, font, anchor="mm")
        if not taken:
            draw.rectangle((left, _HEAD, left + width - 1, _HEAD + height - 1), fill=_EMPTY)
            continue
        panel = large if i == 0 else greyed(large, alive[i - 1], grid)
        sheet.paste(Image.fromarray(panel), (left, _HEAD))
        left_over = tokens if i == 0 else int(alive[i - 1].sum())
        foot = f"{left_over} of {tokens} tokens"
        draw.text((middle, _HEAD + height + _FOOT // 2), foot, _INK, font, anchor="mm")
    return np.asarray(sheet)


def token_text(
    pixels: Pixels, alive: NDArray[np.bool_], grid: tuple[int, int], blocks: Sequence[int]
) -> str:
    """The same as text: a token's shade is its brightness, a dot a pruned token.

    Takes the arguments of :func:`token_picture`; decisions not yet taken are left out.
    """
    rows, columns = grid
    brightness = np.asarray(
        Image.fromarray(pixels).convert("L").resize((columns, rows), Image.Resampling.BOX)
    )
    shade = np.array(list(_SHADES))[brightness // 64]
    panels = [shade, *(np.where(a.reshape(grid), shade, _PRUNED) for a in alive)]
    heads = ["image", *(f"block {b}: {a.sum()}" for b, a in zip(blocks, alive, strict=False))]
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
        alive: ``(T, P)`` whether each token is alive after each decision.
        label: name of the true class.
        dense: name of the class that the dense model predicts.
        reduced: name of the class predicted from the tokens left.
    """

    pixels: Pixels
    alive: NDArray[np.bool_]
    label: str
    dense: str
    reduced: str


def save_token_pictures(
    path: str | os.PathLike[str],
    rows: Sequence[TokenRow],
    grid: tuple[int, int],
    blocks: Sequence[int],
) -> None:
    """Write a picture file with one row per image and one column per decision block.

    Args:
        path: the file; matplotlib knows its format from the suffix, such as ``.png``.
        rows: the images, at least one.
        grid: rows and columns of tokens.
        blocks: the decision blocks, as many as decisions in every row.
    """
    # Not pyplot: it keeps figures, and looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = len(blocks) + 1
    figure = Figure(figsize=(1.7 * columns + 1.6, 1.95 * len(rows) + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    heads = ["image", *(f"block {block}" for block in blocks)]
    for line, row in zip(axes, rows, strict=True):
        large = _enlarged(row.pixels)
        panels = [large, *(greyed(large, alive, grid) for alive in row.alive)]
        for i, (axis, panel) in enumerate(zip(line, panels, strict=True)):
            axis.imshow(panel, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if i:
                axis.set_xlabel(f"{row.alive[i - 1].sum()} tokens", fontsize=9)
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


def greyed(pixels: Pixels, alive: NDArray[np.bool_], grid: tuple[int, int]) -> Pixels:
    """The image ``(H, W, 3)`` with its pruned tokens, not ``alive (P,)``, hatched grey."""
    height, width = pixels.shape[:2]
    row = np.arange(height) * grid[0] // height
    column = np.arange(width) * grid[1] // width
    shown = alive.reshape(grid)[row[:, None], column[None, :], None]
    line = (np.arange(height)[:, None] + np.arange(width)) % _HATCH_STEP == 0
    return np.where(shown, pixels, np.where(line[..., None], _HATCH, _GONE))


def _enlarged(pixels: Pixels) -> Pixels:
    """Each pixel a square of pixels where the image is tiny."""
    factor = max(1, -(-_PANEL // max(pixels.shape[:2])))
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)
