"""What is known of the dense model behind a method or an artefact."""

from __future__ import annotations

from dataclasses import dataclass

from tokenenv.data import Preprocessing


@dataclass(frozen=True)
class MadeOf:
    """The dense model that a method was trained on, or that a model was made from.

    Attributes:
        model: its timm name; None if unknown.
        weights: a file, or None for timm's weights.
        tuned: a file of weights that were fine-tuned from those; None for a frozen backbone.
        preprocessing: what it was made with; None if unknown.
    """

    model: str | None = None
    weights: str | None = None
    tuned: str | None = None
    preprocessing: Preprocessing | None = None
