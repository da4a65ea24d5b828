"""Pictures by matplotlib, without pyplot: it keeps figures in memory and looks for a display."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PALETTE = (
    "#5b2ca0", "#0067a3", "#b04700", "#1a7035", "#a8186c", "#6b5900", "#3f5466", "#b3261e",
)  # fmt: skip
"""Colours of lines and of text beside them: each has a contrast of 4.5 with white (WCAG AA)."""


def line_colour(number: int) -> str:
    """The colour of the line ``number``; after the last one they begin anew."""
    return PALETTE[number % len(PALETTE)]


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, whose panels make room for their labels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure, dpi: int = 120) -> bytes:
    """A figure as a PNG file of ``dpi`` pixels per inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi, format="png")
    return buffer.getvalue()
