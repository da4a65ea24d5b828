"""Contrast of colours as WCAG 2 counts it."""

from __future__ import annotations

Colour = tuple[float, ...]
"""Red, green and blue, 0 to 1."""

TEXT, GRAPHICS = 4.5, 3.0
"""The least contrast at level AA of text, and of what is drawn."""


def from_hex(text: str) -> Colour:
    """``#rrggbb``."""
    return tuple(int(text[i : i + 2], 16) / 255 for i in (1, 3, 5))


def from_rgb(text: str) -> Colour:
    """``rgb(r, g, b)`` or ``rgba(r, g, b, a)``."""
    return tuple(float(v) / 255 for v in text[text.index("(") + 1 : -1].split(",")[:3])


def contrast(one: Colour, other: Colour) -> float:
    """From 1, the same, to 21, black on white."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: Colour) -> float:
    """Relative luminance."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
