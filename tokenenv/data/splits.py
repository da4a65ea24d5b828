"""The parts of a data set."""

from __future__ import annotations

from typing import Literal

Split = Literal["train", "validation", "test"]
"""To learn from, to choose settings on, and to report on."""
