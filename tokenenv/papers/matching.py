"""Baselines set so that they are as accurate, or as cheap, as a paper's method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

SLACK = 1e-6
"""Points by which rounding may part two equal figures."""


@dataclass(frozen=True)
class Measured:
    """A method on held-back training images.

    Attributes:
        top1: percent.
        saved: multiply-adds saved, percent.
    """

    top1: float
    saved: float


@dataclass(frozen=True)
class Match:
    """The setting of a baseline that was found.

    Attributes:
        word: the setting.
        found: what it does on the held-back training images.
        tried: how many settings were measured.
        reached: False if even the mildest setting is less accurate than the reference, or the
            strongest saves less; the word is then that one.
    """

    word: str
    found: Measured
    tried: int
    reached: bool

    def to_dict(self) -> dict[str, Any]:
        """All attributes, as JSON."""
        return {**vars(self), "found": vars(self.found)}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Match:
        """What :meth:`to_dict` returned."""
        return Match(**{**values, "found": Measured(**values["found"])})


def match(
    words: list[str],
    measure: Callable[[str], Measured],
    reference: Measured,
    by: Literal["top1", "macs"],
) -> Match:
    """Find a baseline's setting by bisection.

    Args:
        words: its settings, the mildest first: accuracy falls along them and the saving rises.
        measure: measures one of them.
        reference: the method to match.
        by: ``top1``: the strongest setting that is at least as accurate as the reference; ``macs``:
            the mildest that saves at least as much.
    """
    seen: dict[int, Measured] = {}

    def mild(place: int) -> bool:
        """Whether a setting lies on the mild side of the one that is looked for."""
        found = seen[place] = measure(words[place])
        if by == "top1":
            return found.top1 >= reference.top1 - SLACK
        return found.saved < reference.saved - SLACK

    low, high = -1, len(words)  # the last known to be mild, the first known not to be
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if mild(middle) else (low, middle)
    wanted = low if by == "top1" else high
    place = min(max(wanted, 0), len(words) - 1)
    if place not in seen:
        mild(place)
    return Match(words[place], seen[place], len(seen), place == wanted)
