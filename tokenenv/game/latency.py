"""What a forward pass costs in time on this machine: a table that is measured, and predictions."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import platformdirs
import torch
from torch import Tensor

from tokenenv.artefact import FAULTS, Unfit, Within, check_fields, fits, read_object
from tokenenv.errors import UserError
from tokenenv.game.cost import Costs
from tokenenv.game.episode import Episode
from tokenenv.game.policy import Method
from tokenenv.game.reduction import Reduction
from tokenenv.game.rewards.base import Turn
from tokenenv.game.timing import Clock, Curve, Event, Nothing, time_rounds
from tokenenv.machine import describe_machine
from tokenenv.storage import write_json
from tokenenv.vit.backbone import Backbone

_SECONDS, _TOKENS = Within(0.0, 1e6), Within(0.0, 1e9)
_KINDS: dict[str, Any] = {"key": dict, "embed": _SECONDS, "curves": dict}


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of each part of a batch's forward pass on one machine, by the number of tokens.

    Images of a batch may have different lengths: an image is assumed to take its share, one
    ``batch``-th, of the time of a batch in which all are as long as it. ``benchmarks/
    latency_table.py`` prints how far that is from the clock.

    Attributes:
        key: what it was measured on: machine, torch, model, precision, batch size.
        embed: seconds of the embedding.
        curves: ``attend`` and ``feed`` of each kind of block, such as ``attend 0``; ``finish``, the
            last block and the head where only what the head reads is computed; else ``head``.
    """

    key: dict[str, Any]
    embed: float
    curves: dict[str, Curve]

    @staticmethod
    def measure(
        backbone: Backbone, batch: int, *, budget: float = 15.0, clock: Clock = time.perf_counter
    ) -> LatencyTable:
        """Time the dense model's parts on fresh random images, medians in turns.

        Args:
            backbone: the model.
            batch: images per forward pass.
            budget: seconds to spend, about; at least three rounds are made.
            clock: the time in seconds.
        """
        kinds, samples = _block_kinds(backbone), dict[str, list[tuple[float, float]]]()
        for events in time_rounds(backbone, Nothing(), batch, budget, clock):
            for event in events:
                seconds = event.seconds + event.gap  # what lies between the parts is theirs, too
                name = _name(event, kinds)
                samples.setdefault(name, []).append((event.tokens, seconds))
        embed = Curve.fit([(0.0, seconds) for _, seconds in samples.pop("embed")]).seconds[0]
        curves = {name: Curve.fit(found) for name, found in samples.items()}
        return LatencyTable(table_key(backbone, batch), embed, curves)

    @property
    def batch(self) -> int:
        """Images per forward pass."""
        return int(self.key["batch"])

    def part(self, backbone: Backbone, part: str, block: int) -> Curve:
        """The curve of ``attend`` or ``feed`` of a block."""
        return self.curves[f"{part} {_block_kinds(backbone)[block]}"]

    def backbone_seconds(
        self, backbone: Backbone, attended: Sequence[Tensor], fed: Sequence[Tensor]
    ) -> Tensor:
        """``(B,)`` float64 seconds per image without decisions.

        Args:
            backbone: the model.
            attended: for each block ``(B,)`` tokens in its attention, prefix included.
            fed: for each block ``(B,)`` tokens in its MLP, prefix included.

        Raises:
            UserError: there are more tokens than were measured.
        """
        most = max(float(count.max()) for count in attended)
        full = backbone.prefix + backbone.patches
        if most > full:
            raise UserError(
                f"{most:.0f} tokens are more than the {full} that were timed: measure a table of "
                "the model at that image size"
            )
        short, last = "finish" in self.curves, backbone.depth - 1
        total = torch.full_like(attended[0], self.embed, dtype=torch.float64)
        for block, (one, other) in enumerate(zip(attended, fed, strict=True)):
            if short and block == last:
                total += self.curves["finish"](one)
                break
            total += self.part(backbone, "attend", block)(one)
            total += self.part(backbone, "feed", block)(other)
        if not short:
            total += self.curves["head"](fed[-1])
        return total / self.batch

    def to_json(self) -> dict[str, Any]:
        """The table as JSON."""
        return {"key": self.key, "embed": self.embed, "curves": _curves_json(self.curves)}

    @staticmethod
    def from_json(found: Any) -> LatencyTable:
        """The table that :meth:`to_json` gave.

        Raises:
            Unfit: it is none.
        """
        check_fields(found, _KINDS)
        curves = _read_curves(found["curves"])
        ends = {"finish"} if "finish" in curves else {"head"}
        if not ends | {"attend 0", "feed 0"} <= curves.keys():
            raise Unfit("a curve is missing")
        return LatencyTable(found["key"], found["embed"], curves)


class TimeCost(Costs):
    """Predicted seconds per image at one batch size, decisions of one method included.

    Args:
        backbone: the model.
        table: the times of its parts.
        decisions: for each decision of the method its curve, by its index, see
            :func:`measure_decisions`.

    Attributes:
        backbone, table, decisions: as given.
    """

    unit, word, saved_words = "s", "time", "less predicted time"

    def __init__(
        self, backbone: Backbone, table: LatencyTable, decisions: dict[int, Curve]
    ) -> None:
        self.backbone, self.table, self.decisions = backbone, table, decisions

    def dense(self) -> float:
        """Seconds of the dense model for one image."""
        counts = [torch.tensor([self.backbone.prefix + self.backbone.patches])]
        counts *= self.backbone.depth
        return float(self.table.backbone_seconds(self.backbone, counts, counts))

    def of(self, episode: Episode, method: Method) -> Tensor:
        """``(B,)`` seconds of each image of a finished episode, decisions included."""
        total = self.table.backbone_seconds(self.backbone, episode.attended, episode.fed)
        prefix = self.backbone.prefix
        for step, before in enumerate(episode.counts[:-1]):
            total = total + self.decision_seconds(step, before + prefix)
        return total

    def decision_seconds(self, step: int, tokens: Tensor) -> Tensor:
        """Seconds per image of a decision at ``tokens``, prefix included; 0 for one not taken."""
        if step not in self.decisions:
            return torch.zeros_like(tokens, dtype=torch.float64)
        return self.decisions[step](tokens) / self.table.batch

    def most_saved(self, reduction: Reduction) -> float:
        """The largest saving, percent: the first decision leaves one patch, all are paid."""
        computation = self.computation(reduction)
        full = torch.tensor([self.backbone.prefix + self.backbone.patches])
        paid = sum(self.decision_seconds(step, full) for step in range(len(reduction.blocks)))
        return 100 * (computation.most - float(paid) / self.dense())

    def computation(self, reduction: Reduction) -> TimeOfTokens:
        """What tokens cost after each decision, for rewards."""
        return TimeOfTokens(self, reduction)


class TimeOfTokens:
    """What removing tokens at a decision saves, as a share of the dense model's time.

    It counts all later parts and decisions, as if none of these removed more tokens. Over an
    episode the savings add up to the whole, less what all decisions cost at full length.

    Args:
        cost: the predicted times.
        reduction: whose decisions they are.

    Attributes:
        weights: for each decision, what a token costs until the next one, over the mean of all.
        most: largest share that an episode can save of the dense model's time with all decisions.
    """

    def __init__(self, cost: TimeCost, reduction: Reduction) -> None:
        backbone, dense = cost.backbone, cost.dense()
        tokens = torch.arange(backbone.prefix + backbone.patches + 1)
        rest = [
            remaining_seconds(cost, block, reduction.between, tokens) for block in reduction.blocks
        ]
        later = torch.zeros(len(tokens), dtype=torch.float64)
        for step in reversed(range(len(rest))):
            rest[step] = rest[step] + later
            later = later + cost.decision_seconds(step, tokens)
        self._rest = torch.stack(rest).div(dense).float().to(backbone.device)
        self._prefix = backbone.prefix
        self.most = float(self._rest[0, -1] - self._rest[0, backbone.prefix + 1])
        slopes = self._rest[:, -1] - self._rest[:, backbone.prefix + 1]
        own = (slopes - torch.cat([slopes[1:], slopes.new_zeros(1)])).clamp(min=0)
        self.weights: tuple[float, ...] = tuple((own / own.mean()).tolist())

    def saved(self, turn: Turn) -> Tensor:
        """``(B,)`` share of the dense model's time that a decision saves."""
        rest = self._rest[turn.step]
        before, after = (turn.counts[i].long() + self._prefix for i in (-2, -1))
        return rest[before] - rest[after]


def remaining_seconds(cost: TimeCost, block: int, between: bool, tokens: Tensor) -> Tensor:
    """Seconds per image of all parts after a decision in ``block``, without other decisions."""
    table, backbone = cost.table, cost.backbone
    short, last = "finish" in table.curves, backbone.depth - 1
    total = torch.zeros_like(tokens, dtype=torch.float64)
    for later in range(block, backbone.depth):
        if short and later == last:
            # A decision within the last block changes nothing that is computed for the head.
            if not (between and later == block):
                total = total + table.curves["finish"](tokens)
            continue
        if later > block or not between:
            total = total + table.part(backbone, "attend", later)(tokens)
        total = total + table.part(backbone, "feed", later)(tokens)
    if not short:
        total = total + table.curves["head"](tokens)
    return total / table.batch


def measure_decisions(
    backbone: Backbone,
    table: LatencyTable,
    method: Method,
    *,
    budget: float = 15.0,
    clock: Clock = time.perf_counter,
) -> dict[int, Curve]:
    """Seconds per batch of each decision of a method, by the tokens before it.

    A decision is what lies between two halves of blocks, and what the attention computes in
    addition: that of blocks without a decision counts for the last one before. Decisions are timed
    as they fall on random images, so one that does more on images with more to remove, such as
    that behind a gate, takes another time there. One that is never taken, such as one in the last
    block that changes no logits, has no curve.

    Args:
        backbone: the model.
        table: its times, of the batch size that is meant.
        method: the policy or reducer.
        budget: seconds to spend, about.
        clock: the time in seconds.
    """
    reduction, samples = method.reduction, dict[int, list[tuple[float, float]]]()
    due = {
        (2 * block + 1 if reduction.between else 2 * block): step
        for step, block in enumerate(reduction.blocks)
    }
    halves = {"attend": 0, "feed": 1, "finish": 0}
    # Half 2 b is the attention of block b, half 2 b + 1 its MLP. What an attention takes beyond the
    # dense model's is put to the decision that reads it, or, where it only weighs merged tokens by
    # their size, to the decision before.
    for events in time_rounds(backbone, method, table.batch, budget, clock):
        extra, found, last = 0.0, dict[int, list[float]](), None
        for event in events:
            half = 2 * event.block + halves.get(event.part, 0)
            step = due.get(half) if event.part in halves else None
            if step is not None:
                found[step] = [event.tokens, event.gap + extra]
                extra, last = 0.0, step
            if event.part in ("attend", "finish"):
                curve = (
                    table.curves["finish"]
                    if event.part == "finish"
                    else table.part(backbone, "attend", event.block)
                )
                more = event.seconds - float(curve(torch.tensor(event.tokens)))
                reads = due.get(half + 1, due.get(half + 2))
                if reads is not None and any(reduction.wants(event.block).values()):
                    extra += more
                elif last is not None and reduction.wants(event.block).get("proportional"):
                    found[last][1] += more
        # A decision's curve is over the tokens before it; its event has those after it.
        counts = {event.block: event.tokens for event in events if event.part == "attend"}
        counts[-1] = events[0].tokens
        for step, (_, seconds) in found.items():
            before = counts[reduction.blocks[step] - (not reduction.between)]
            samples.setdefault(step, []).append((before, seconds))
    return {step: Curve.fit(found) for step, found in samples.items()}


# The cache ---------------------------------------------------------------------------------------
def open_table(backbone: Backbone, batch: int, *, budget: float = 15.0) -> LatencyTable:
    """The table of a model at a batch size: from the cache, or measured and put there.

    The cache is the user's cache folder, or ``TOKENENV_CACHE``. A file of another machine, version
    of torch or number of threads, or an unreadable one, is replaced; a line says so.

    Args:
        backbone: the model.
        batch: images per forward pass. Others than those measured are measured, not guessed.
        budget: seconds of a measurement, about.
    """
    key = table_key(backbone, batch)
    path = _cache_folder() / f"{_name_of(key)}.json"
    reason = ""
    if path.exists():
        try:
            found = LatencyTable.from_json(read_object(path, _KINDS, "it is measured again"))
            changed = [name for name in key if found.key.get(name) != key[name]]
            if not changed:
                return found
            name = changed[0]
            reason = f"'{path}' has {name} '{found.key.get(name)}', not '{key[name]}'"
        except UserError as error:
            reason = str(error).split(": it is measured again")[0]
        except FAULTS as error:
            reason = f"cannot read '{path}' ({error})"
    told = f"{reason}: " if reason else ""
    print(f"{told}timing the model's parts at batch size {batch}", file=sys.stderr)
    table = LatencyTable.measure(backbone, batch, budget=budget)
    write_json(path, table.to_json())
    return table


def time_cost(backbone: Backbone, method: Method, batch: int, *, budget: float = 15.0) -> TimeCost:
    """Predicted times of a method on a model: its table from the cache, its decisions measured."""
    table = open_table(backbone, batch, budget=budget)
    return TimeCost(backbone, table, measure_decisions(backbone, table, method, budget=budget))


def table_key(backbone: Backbone, batch: int) -> dict[str, Any]:
    """What a table depends on."""
    return {
        "machine": describe_machine(backbone.device),
        "model": backbone.architecture or type(backbone.model).__name__,
        "shape": _shape(backbone),
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "device": backbone.device.type,
        "batch": batch,
    }


def cost_to_json(cost: TimeCost) -> dict[str, Any]:
    """Table and decisions as JSON, for a run folder."""
    decisions = {str(step): curve for step, curve in cost.decisions.items()}
    return {"table": cost.table.to_json(), "decisions": _curves_json(decisions)}


def cost_from_json(backbone: Backbone, found: dict[str, Any]) -> TimeCost:
    """The cost that :func:`cost_to_json` gave.

    Raises:
        Unfit: it is none, or of another model.
    """
    check_fields(found, {"table": dict, "decisions": dict})
    table = LatencyTable.from_json(found["table"])
    if table.key.get("shape") != _shape(backbone):
        raise Unfit("the times are of another model")
    decisions = _read_curves(found["decisions"])
    return TimeCost(backbone, table, {int(step): curve for step, curve in decisions.items()})


def _cache_folder() -> Path:
    own = os.environ.get("TOKENENV_CACHE")
    return Path(own) if own else Path(platformdirs.user_cache_dir("tokenenv", appauthor=False))


def _name_of(key: dict[str, Any]) -> str:
    kept = {name: value for name, value in key.items() if name != "machine"}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]
    return f"latency-{digest}"


def _shape(backbone: Backbone) -> str:
    """A digest of names and shapes of all parameters, and of the image size."""
    shapes = [(name, tuple(p.shape)) for name, p in backbone.model.named_parameters()]
    told = repr((shapes, backbone.image_shape, [backbone.family.heads(i)
                 for i in range(backbone.depth)]))  # fmt: skip
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _block_kinds(backbone: Backbone) -> list[int]:
    """For each block the number of its kind; blocks of one kind have the same shapes."""
    shapes = [
        (tuple(tuple(p.shape) for p in block.parameters()), backbone.family.heads(i))
        for i, block in enumerate(backbone.blocks)
    ]
    known = list(dict.fromkeys(shapes))
    return [known.index(shape) for shape in shapes]


def _name(event: Event, kinds: list[int]) -> str:
    if event.part in ("attend", "feed"):
        return f"{event.part} {kinds[event.block]}"
    return event.part


def _curves_json(curves: dict[str, Curve]) -> dict[str, Any]:
    return {name: [list(c.tokens), list(c.seconds)] for name, c in curves.items()}


def _read_curves(found: dict[str, Any]) -> dict[str, Curve]:
    curves = {}
    for name, pair in found.items():
        if not (fits(pair, list) and len(pair) == 2 and all(fits(each, list) for each in pair)):
            raise Unfit(f"'{name:.40}' is no curve")
        tokens, seconds = pair
        rises = all(a < b for a, b in pairwise(tokens))
        numbers = all(fits(n, _TOKENS) for n in tokens) and all(fits(s, _SECONDS) for s in seconds)
        if not (tokens and numbers and rises and len(tokens) == len(seconds)):
            raise Unfit(f"'{name:.40}' is no curve")
        curves[name] = Curve(tuple(tokens), tuple(seconds))
    return curves
