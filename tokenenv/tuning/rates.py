"""Greedy search for DiffRate's rates: how many tokens each block prunes and merges."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenenv.errors import UserError
from tokenenv.game.cost import Cost
from tokenenv.game.latency import TimeCost
from tokenenv.game.policy import play
from tokenenv.reducers import DiffRate
from tokenenv.vit.backbone import Backbone


@dataclass(frozen=True)
class Outcome:
    """The effect of rates: mean KL divergence from the dense predictions, share of cost saved."""

    damage: float
    saving: float


@dataclass(frozen=True)
class RateSearch:
    """Finds rates for a model, step by step, without labels and without gradients.

    DiffRate (Chen et al., ICCV 2023) learns its rates by gradient. Here each step prunes or merges
    more tokens in the block where the divergence from the dense model's predictions grows least per
    unit of cost saved. In the last block nothing is removed if the head reads prefix tokens only: a
    pass for the logits computes nothing else of it, so that it would save nothing.

    Args:
        backbone: the model.
        images: ``(n, C, H, W)`` that rates are tried on, normalised, for the model.
        dense: ``(n, classes)`` the dense model's log-probabilities for them.
        cost: what is saved: multiply-adds, or predicted time with the curves of a decision in each
            block. A block without rates takes no decision.
        batch: images per pass.
        passed: called after each batch with its number of images. The first step takes a pass over
            the images for every move there is.
    """

    backbone: Backbone
    images: Tensor
    dense: Tensor
    cost: Cost | TimeCost
    batch: int = 64
    passed: Callable[[int], object] = lambda images: None

    def outcome(self, rates: DiffRate) -> Outcome:
        """The outcome of rates, from one pass over the images."""
        damage = 0.0
        parts = zip(self.images.split(self.batch), self.dense.split(self.batch), strict=True)
        for images, dense in parts:
            logits = play(self.backbone, rates, images, only_logits=True).logits
            assert logits is not None
            log_probs = F.log_softmax(logits.float(), -1)
            damage += F.kl_div(log_probs, dense, reduction="sum", log_target=True).item()
            self.passed(len(images))
        return Outcome(damage / len(self.images), self.saving(rates))

    def saving(self, rates: DiffRate) -> float:
        """Share of the dense model's cost that rates save; all images keep as many tokens."""
        backbone, prefix = self.backbone, self.backbone.prefix
        visual, attended, fed = backbone.patches, [], []
        for step in range(backbone.depth):
            attended.append(torch.tensor([prefix + visual]))
            visual = rates.left(backbone, step, visual)
            fed.append(torch.tensor([prefix + visual]))
        if isinstance(self.cost, Cost):
            total = self.cost.backbone_macs(attended, fed)
            total = total + self.cost.decision_macs(rates, attended, fed)
        else:
            total = self.cost.table.backbone_seconds(backbone, attended, fed)
            for step, count in enumerate(attended):
                if rates.prune[step] or rates.merge[step]:
                    total = total + self.cost.decision_seconds(step, count)
        return 1 - float(total) / self.cost.dense()

    def path(
        self, step: int, sizes: tuple[int, ...] = (1,), last: float = 1.0
    ) -> Iterator[tuple[DiffRate, Outcome]]:
        """Rates of rising saving, from none on; each is the cheapest step from the one before.

        The price of a move mostly grows with the moves made before it. So only the move that was
        cheapest when last tried is tried again, until the cheapest one was tried at the current
        rates.

        Args:
            step: number of tokens to prune or merge more.
            sizes: how many steps a move may take at once. Where a decision costs more than one step
                saves, only larger moves save anything.
            last: the saving after which the path ends.
        """
        depth = self.backbone.depth
        removing = depth - self.backbone.reads_prefix
        rates = DiffRate(tuple(range(depth)), (0,) * depth, (0,) * depth)
        now, turn = self.outcome(rates), 0
        # price when last tried (of equals the one that saves most), when that was, what came of it
        moves = [
            (-math.inf, 0.0, -1, kind, block, size, now)
            for size in sizes
            for kind in ("prune", "merge")
            for block in range(removing)
        ]
        yield rates, now
        while moves and now.saving < last:
            *_, tried, kind, block, size, then = heapq.heappop(moves)
            numbers = list(getattr(rates, kind))
            numbers[block] += size * step
            more = replace(rates, **{kind: tuple(numbers)})
            if tried < turn:
                gained = self.saving(more) - now.saving
                if gained > 0:
                    then = self.outcome(more)
                    price = (then.damage - now.damage) / gained
                    move = (price, -then.saving, turn, kind, block, size, then)
                    heapq.heappush(moves, move)
                continue
            now, rates, turn = then, more, turn + 1
            heapq.heappush(moves, (-math.inf, 0.0, -1, kind, block, size, now))
            yield rates, now

    def run(
        self, saving: float, step: int, progress: Callable[[Outcome], object] = lambda outcome: None
    ) -> DiffRate:
        """The first rates on the path that save ``saving`` of the cost.

        Raises:
            UserError: no rates save as much.
        """
        for rates, outcome in self.path(step, last=saving):
            progress(outcome)
            if outcome.saving >= saving:
                return rates
        raise UserError(f"no rates save {100 * saving:.1f} %: ask for less")


def word_of(rates: DiffRate) -> str:
    """The word that names rates, such as ``diffrate:prune=4,merge=8,blocks=3``."""
    used = [i for i in range(len(rates.blocks)) if rates.prune[i] or rates.merge[i]]
    blocks, prune, merge = (
        "/".join(str(numbers[i]) for i in used)
        for numbers in (rates.blocks, rates.prune, rates.merge)
    )
    if not used:
        return "keep-all"
    return f"diffrate:prune={prune},merge={merge},blocks={blocks}"
