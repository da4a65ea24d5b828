"""Timing the parts of a forward pass: a backbone with a stopwatch, and curves over tokens."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.isotonic import isotonic_regression
from torch import Tensor

from tokenenv.game.policy import Method, play
from tokenenv.game.reduction import Reduction
from tokenenv.vit.backbone import Backbone, Context
from tokenenv.vit.packing import compact
from tokenenv.vit.tokens import Tokens

Clock = Callable[[], float]
"""A function that returns the time in seconds."""

LEAST_ROUNDS, MOST_ROUNDS = 3, 60
GRID = 8
"""Numbers of token counts at which a forward pass is timed."""


@dataclass(frozen=True)
class Curve:
    """Seconds of one part of a batch's forward pass, for any number of tokens per image.

    Linear between the counts that were measured, constant beyond the lowest and the highest.

    Attributes:
        tokens: the measured counts, strictly increasing.
        seconds: the time at each, not falling.
    """

    tokens: tuple[float, ...]
    seconds: tuple[float, ...]

    @staticmethod
    def fit(samples: Sequence[tuple[float, float]]) -> Curve:
        """The curve through the medians at each count, made monotone by isotonic regression.

        Where there are more than twice :data:`GRID` counts, as after decisions that differ from
        image to image, neighbours are put together.

        Args:
            samples: pairs of a token count and seconds, in any order, several for a count.
        """
        found: dict[float, list[float]] = {}
        for count, seconds in sorted(samples):
            found.setdefault(float(count), []).append(seconds)
        if len(found) > 2 * GRID:
            parts = np.array_split(np.array(sorted(samples)), GRID)
            found = {float(part[:, 0].mean()): part[:, 1].tolist() for part in parts}
        medians = np.maximum([np.median(seconds) for seconds in found.values()], 0.0)
        fitted = isotonic_regression(medians, sample_weight=[len(s) for s in found.values()])
        return Curve(tuple(found), tuple(float(value) for value in fitted))

    def __call__(self, tokens: Tensor) -> Tensor:
        """Seconds, float64, of the shape of ``tokens``."""
        at = tokens.double()
        x = torch.tensor(self.tokens, dtype=torch.float64, device=at.device)
        y = torch.tensor(self.seconds, dtype=torch.float64, device=at.device)
        if len(x) == 1:
            return torch.full_like(at, self.seconds[0])
        right = torch.searchsorted(x, at.contiguous()).clamp(1, len(x) - 1)
        share = ((at - x[right - 1]) / (x[right] - x[right - 1])).clamp(0, 1)
        return y[right - 1] + share * (y[right] - y[right - 1])


class Event(NamedTuple):
    """One part of a forward pass.

    Attributes:
        part: ``embed``, ``attend``, ``feed``, ``finish`` (last block and head) or ``head``.
        block: its block; the number of blocks for ``head``.
        tokens: mean tokens per image, prefix included.
        gap: seconds since the part before it ended.
        seconds: its own time.
    """

    part: str
    block: int
    tokens: float
    gap: float
    seconds: float


class Stopwatch(Backbone):
    """A backbone that notes when its parts start and end, and that can start with fewer tokens.

    It shares the model of another backbone. The clock is read when the device has finished, so on
    an accelerator the parts don't overlap with the host's work as they may without a stopwatch.

    Args:
        backbone: the backbone.
        clock: the time in seconds.
    """

    def __init__(self, backbone: Backbone, clock: Clock = time.perf_counter) -> None:
        super().__init__(backbone.model, freeze=False, proven=True, family=type(backbone.family))
        self._clock, self._count, self._end = clock, 0, 0.0
        self._finishing = False
        self.events: list[Event] = []

    def run(self, method: Method, images: Tensor, count: int) -> list[Event]:
        """The parts of a pass whose tokens are cut to ``count``, prefix included, after embedding.

        Images ``(B, C, H, W)`` run to their logits as in a compressed model.
        """
        self._count, self.events = count, []
        self._end = self._now()
        play(self, method, images, only_logits=True, visual=count - self.prefix)
        return self.events

    def embed(self, images: Tensor, *, trace: bool = True) -> Tokens:
        """As the backbone's, then cut to the number of tokens wanted, which is not timed."""
        start = self._now()
        tokens = super().embed(images, trace=trace)
        seconds = self._now() - start
        tokens = _cut(tokens, self._count)
        self.events.append(Event("embed", 0, float(self._count), start - self._end, seconds))
        self._end = self._now()
        return tokens

    def attend(self, block: int, tokens: Tokens, **wants: Any) -> tuple[Tokens, Context]:
        """As the backbone's."""
        start = self._now()
        found = super().attend(block, tokens, **wants)
        self._note("attend", block, start, tokens)
        return found

    def through(self, block: int, tokens: Tokens, *, proportional: bool = False) -> Tokens:
        """A block in its two halves, each with its own time."""
        tokens, _ = self.attend(block, tokens, proportional=proportional)
        return self.feed(block, tokens)

    def feed(self, block: int, tokens: Tokens) -> Tokens:
        """As the backbone's."""
        start = self._now()
        found = super().feed(block, tokens)
        self._note("feed", block, start, tokens)
        return found

    def finish(self, tokens: Tokens, *, proportional: bool = False) -> Tensor:
        """As the backbone's; one part, head included."""
        start, self._finishing = self._now(), True
        logits = super().finish(tokens, proportional=proportional)
        self._finishing = False
        self._note("finish", self.depth - 1, start, tokens)
        return logits

    def classify(self, tokens: Tokens) -> Tensor:
        """As the backbone's."""
        if self._finishing:
            return super().classify(tokens)
        start = self._now()
        logits = super().classify(tokens)
        self._note("head", self.depth, start, tokens)
        return logits

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self._clock()

    def _note(self, part: str, block: int, start: float, tokens: Tokens) -> None:
        end = self._now()
        gap = start - self._end
        count = float(tokens.counts().double().mean())
        self.events.append(Event(part, block, count, gap, end - start))
        self._end = self._now()  # what was done since is not timed


class Nothing(Method):
    """The method that decides nowhere."""

    @property
    def reduction(self) -> Reduction:
        """A reduction without blocks."""
        found = Reduction()
        found.blocks = ()
        return found


def time_rounds(
    backbone: Backbone, method: Method, batch: int, budget: float, clock: Clock
) -> list[list[Event]]:
    """The parts of forward passes on random images, in turns over a grid of token counts.

    Args:
        backbone: the model.
        method: what reduces the tokens.
        batch: images per pass; drawn anew for each.
        budget: seconds after which no further round is started; there are at least three.
        clock: the time in seconds.
    """
    watch, counts = Stopwatch(backbone, clock), token_grid(backbone)
    method = copy.deepcopy(method)
    generator = torch.Generator().manual_seed(0)

    def images() -> Tensor:
        drawn = torch.randn(batch, *backbone.image_shape, generator=generator)
        return drawn.to(backbone.device, backbone.dtype)

    found = []
    with torch.inference_mode():
        watch.run(method, images(), counts[-1])  # the first pass allocates memory
        start = time.perf_counter()
        for turn in range(MOST_ROUNDS):
            if turn >= LEAST_ROUNDS and time.perf_counter() - start > budget:
                break
            first = turn % len(counts)
            for count in counts[first:] + counts[:first]:
                found.append(watch.run(method, images(), count))
    return found


def token_grid(backbone: Backbone) -> list[int]:
    """Increasing token counts, prefix included, from one patch to all of them."""
    shares = np.linspace(0, 1, GRID)
    patches = {max(1, round(float(share) * backbone.patches)) for share in shares}
    return [backbone.prefix + count for count in sorted(patches)]


def _cut(tokens: Tokens, count: int) -> Tokens:
    """The first ``count`` tokens; the others are pruned."""
    if count >= tokens.alive.shape[1]:
        return tokens
    alive = tokens.alive.clone()
    alive[:, count:] = False
    source = tokens.source
    if source is not None:
        source = source.masked_fill(source >= count, -1)
    pruned = replace(tokens, alive=alive, size=tokens.size * alive, source=source, ragged=True)
    return compact(pruned)
