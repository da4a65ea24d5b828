"""Generated images: a digit somewhere among clutter, so that which tokens are removed matters.

A scene of 48x48 pixels holds one whole glyph of scikit-learn's digits, its label, at a random
place, in a random size, rotation, slant and contrast. Around it lie pieces of other glyphs (at most
four of eight rows and columns), strokes, a texture and noise. The glyph fills from a tenth to two
fifths of the canvas, and the clutter is dense or sparse, so how many tokens an image needs differs
from image to image.

The glyphs are divided among the parts: those of ``test`` are the test digits of
:func:`tokenenv.vit.digits.digits`, those of ``train`` and ``validation`` its training digits. Scene
``i`` of a part is always the same image (up to rounding of single pixels, which depends on the
processor). It is drawn together with its neighbours, :data:`CHUNK` at a time, from numpy's frozen
``RandomState`` with the part and the number of the chunk as its seed.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tokenenv.data.splits import Split
from tokenenv.errors import UserError

SIDE = 48
"""Side of a scene, pixels."""

CHUNK = 64
"""Scenes that are drawn together."""

COUNTS = {"train": 3000, "validation": 1000, "test": 4000}
"""Scenes of each part that data ``scenes`` has; :func:`scenes` draws any number of others."""

_SEEDS = {"train": 1, "validation": 2, "test": 3}
_VALIDATION_EVERY = 6  # of the training digits of a class, one for validation
_PIECES, _STROKES = 6, 4  # at most, in a scene
_SIZES, _PIECE_SIZES = (15.0, 30.0), (13.0, 24.0)  # sides before they are cut, pixels


class Scenes(NamedTuple):
    """Some scenes.

    Attributes:
        images: ``(n, 1, 48, 48)`` uint8.
        labels: ``(n,)`` int64, the digit.
        ink: ``(n, 1, 48, 48)`` uint8, how much of each pixel is the digit's stroke, of 255.
        glyphs: ``(n,)`` int64, the digit's place in :func:`glyphs`.
    """

    images: Tensor
    labels: Tensor
    ink: Tensor
    glyphs: Tensor


@functools.cache
def glyphs(split: Split) -> tuple[Tensor, Tensor]:
    """The digits that scenes of a part are made of: 993 for training, 204 for validation, 600.

    Returns:
        Ink ``(n, 8, 8)`` float32 in ``[0, 1]`` and labels ``(n,)`` int64.
    """
    from tokenenv.vit.digits import digits  # imports timm

    images, labels = digits("test" if split == "test" else "train")
    if split != "test":
        held = torch.zeros(len(labels), dtype=torch.bool)
        for digit in range(10):
            held[(labels == digit).nonzero()[::_VALIDATION_EVERY, 0]] = True
        chosen = held if split == "validation" else ~held
        images, labels = images[chosen], labels[chosen]
    return images[:, 0].float() / 255, labels


@functools.cache
def data_set(split: Split) -> Scenes:
    """The scenes of a part that data ``scenes`` has, :data:`COUNTS` of them."""
    return scenes(split, COUNTS[split])


def scenes(split: Split, count: int, start: int = 0) -> Scenes:
    """Scenes ``start`` to ``start + count - 1`` of a part; there is no last one.

    Raises:
        UserError: ``count`` is less than 1, or ``start`` less than 0.
    """
    if count < 1 or start < 0:
        raise UserError(
            f"cannot draw {count} scenes from number {start}: ask for at least 1, from 0 or later"
        )
    first, last = start // CHUNK, (start + count - 1) // CHUNK
    parts = [_chunk(split, number) for number in range(first, last + 1)]
    skip = start - first * CHUNK
    whole = (torch.cat(field)[skip : skip + count] for field in zip(*parts, strict=True))
    return Scenes(*whole)


class _Draw:
    """Random numbers of a chunk, in a fixed order."""

    def __init__(self, split: Split, number: int) -> None:
        # The legacy generator: numpy promises that its numbers never change.
        self._state = np.random.RandomState([_SEEDS[split], *divmod(number, 2**32)])

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """``(CHUNK, *shape)`` float32."""
        drawn: NDArray[np.float64] = self._state.random_sample((CHUNK, *shape))
        return torch.from_numpy((low + (high - low) * drawn).astype(np.float32))

    def whole(self, below: int, *shape: int) -> Tensor:
        """``(CHUNK, *shape)`` int64 from 0 to ``below - 1``."""
        drawn: NDArray[np.float64] = self._state.random_sample((CHUNK, *shape))
        return torch.from_numpy((drawn * below).astype(np.int64))

    def normal(self, *shape: int) -> Tensor:
        """``(CHUNK, *shape)`` float32 of mean 0 and variance 1."""
        return torch.from_numpy(self._state.standard_normal((CHUNK, *shape)).astype(np.float32))


def _chunk(split: Split, number: int) -> Scenes:
    """Chunk ``number``: ``CHUNK`` scenes."""
    draw = _Draw(split, number)
    shapes, labels = glyphs(split)
    chosen = draw.whole(len(labels))
    background = _texture(draw)
    glyph, square = _glyph(draw, shapes[chosen])
    crowd = draw.uniform(0.15, 1.0, 1)  # the share of possible clutter that is there
    clutter = torch.maximum(_pieces(draw, shapes, crowd), _strokes(draw, crowd))
    ink = glyph * draw.uniform(0.65, 1.0)[:, None, None]
    light = torch.maximum(ink, clutter * (1 - 0.9 * square))
    noise = draw.normal(SIDE, SIDE) * draw.uniform(0.02, 0.06)[:, None, None]
    pixels = background + (1 - background) * light + noise

    def levels(values: Tensor) -> Tensor:
        return (values.clamp(0, 1) * 255).round().to(torch.uint8)[:, None]

    return Scenes(levels(pixels), labels[chosen], levels(glyph), chosen)


def _glyph(draw: _Draw, shapes: Tensor) -> tuple[Tensor, Tensor]:
    """The digits ``(n, 8, 8)`` on their canvases, and the squares that they stand in."""
    low, high = _SIZES
    size = low * (high / low) ** draw.uniform(0, 1)
    free = SIDE - size
    place = draw.uniform(0, 1, 2) * free[:, None] + size[:, None] / 2
    angle, slant = draw.uniform(-0.35, 0.35), draw.uniform(-0.15, 0.15)
    both = torch.stack([shapes, torch.ones_like(shapes)], 1)
    placed = _placed(both, size, angle, slant, place)
    return placed[:, 0], placed[:, 1]


def _pieces(draw: _Draw, shapes: Tensor, crowd: Tensor) -> Tensor:
    """``(n, SIDE, SIDE)``: pieces of random digits, the brightest where they overlap."""
    number = _PIECES
    chosen = shapes[draw.whole(len(shapes), number)]  # (n, number, 8, 8)
    line = torch.arange(8)
    cut = torch.ones_like(chosen, dtype=torch.bool)
    for axis in (2, 3):
        begin = draw.whole(5, number)[..., None]
        length = 3 + draw.whole(2, number)[..., None]
        inside = (line >= begin) & (line < begin + length)
        cut &= inside[:, :, :, None] if axis == 2 else inside[:, :, None, :]
    there = draw.uniform(0, 1, number) < crowd
    strength = draw.uniform(0.35, 0.85, number) * there
    pieces = chosen * cut * strength[..., None, None]
    placed = _placed(
        pieces.flatten(0, 1)[:, None],
        draw.uniform(*_PIECE_SIZES, number).flatten(),
        draw.uniform(-np.pi, np.pi, number).flatten(),
        draw.uniform(-0.15, 0.15, number).flatten(),
        draw.uniform(0, SIDE, number, 2).flatten(0, 1),
    )
    return placed.view(CHUNK, number, SIDE, SIDE).amax(1)


def _placed(shapes: Tensor, size: Tensor, angle: Tensor, slant: Tensor, place: Tensor) -> Tensor:
    """Put shapes on canvases.

    Args:
        shapes: ``(m, c, 8, 8)``.
        size: ``(m,)`` side of the shape, pixels.
        angle: ``(m,)`` rotation, radians.
        slant: ``(m,)`` horizontal shift per vertical distance.
        place: ``(m, 2)`` x and y of the centre, pixels.

    Returns:
        ``(m, c, SIDE, SIDE)``.
    """
    scale = SIDE / size
    centre = place / (SIDE / 2) - 1
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = torch.stack([cos + slant * sin, sin - slant * cos, -sin, cos], 1).view(-1, 2, 2)
    shift = -(rows @ centre[:, :, None])
    grid = F.affine_grid(
        torch.cat([rows, shift], 2), [len(shapes), 1, SIDE, SIDE], align_corners=False
    )
    return F.grid_sample(shapes, grid, align_corners=False)


def _strokes(draw: _Draw, crowd: Tensor) -> Tensor:
    """``(n, SIDE, SIDE)``: straight strokes of soft edges."""
    number = _STROKES
    middle = draw.uniform(0, SIDE, number, 2)
    half, angle = draw.uniform(3, 12, number), draw.uniform(0, np.pi, number)
    width = draw.uniform(0.8, 1.6, number)
    strength = draw.uniform(0.3, 0.9, number) * (draw.uniform(0, 1, number) < crowd)
    line = torch.arange(SIDE) + 0.5
    across = line - middle[..., :1]  # (n, number, SIDE)
    down = line - middle[..., 1:]
    cos, sin = angle.cos()[..., None], angle.sin()[..., None]
    along = (across * cos)[:, :, None, :] + (down * sin)[:, :, :, None]
    beside = (down * cos)[:, :, :, None] - (across * sin)[:, :, None, :]
    past = (along.abs() - half[..., None, None]).clamp(min=0)
    distance = past.square().add_(beside.square()).sqrt_()
    lit = (width[..., None, None] - distance).clamp(0, 1) * strength[..., None, None]
    return lit.amax(1)


def _texture(draw: _Draw) -> Tensor:
    """``(n, SIDE, SIDE)``: soft spots of two sizes and a grating, each strong or weak."""
    found = torch.zeros(CHUNK, SIDE, SIDE)
    for cells, most in ((7, 0.3), (17, 0.25)):
        spots = draw.uniform(0, 1, 1, cells, cells)
        wide = F.interpolate(spots, (SIDE, SIDE), mode="bilinear", align_corners=True)[:, 0]
        found += wide * draw.uniform(0, most)[:, None, None]
    waves, angle = draw.uniform(2, 10), draw.uniform(0, np.pi)
    phase, height = draw.uniform(0, 2 * np.pi), draw.uniform(0, 0.08)
    line = torch.arange(SIDE) / SIDE * 2 * np.pi
    turned = (angle.cos() * waves)[:, None] * line, (angle.sin() * waves)[:, None] * line
    grating = (turned[0][:, None, :] + turned[1][:, :, None] + phase[:, None, None]).sin()
    return found.add_((1 + grating) * height[:, None, None])
