"""Which decisions pay: what each takes, and how many tokens have to go for that."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokenenv.game.latency import TimeCost, remaining_seconds
from tokenenv.game.reduction import Reduction


@dataclass(frozen=True)
class BreakEven:
    """One decision of a method at one number of tokens.

    Attributes:
        block: its block.
        tokens: tokens per image before it, prefix included.
        decision_ms: what it takes, milliseconds per image; 0 if it is not taken.
        block_ms: what the halves of blocks and the head after it take, milliseconds per image.
        least: the least number of tokens that it has to remove to save the time that it takes;
            None if removing all but one patch does not.
    """

    block: int
    tokens: int
    decision_ms: float
    block_ms: float
    least: int | None

    def pays(self, removed: float) -> bool:
        """Whether removing ``removed`` tokens saves at least what the decision takes."""
        return self.least is not None and removed >= self.least


def break_even(cost: TimeCost, reduction: Reduction) -> list[BreakEven]:
    """For each decision what it takes and from how many removed tokens on it pays.

    The tokens before it are the most that the method left there when it was timed. A removed token
    saves time in all later halves of blocks and in the head; what later decisions take is left out.

    Args:
        cost: the predicted times of the method.
        reduction: the method's reduction.
    """
    backbone, blocks = cost.backbone, reduction.blocks
    full = backbone.prefix + backbone.patches
    found = []
    for step, block in enumerate(blocks):
        count = round(cost.decisions[step].tokens[-1]) if step in cost.decisions else full
        takes = float(cost.decision_seconds(step, torch.tensor(float(count))))
        left = torch.arange(count, backbone.prefix, -1)
        rest = remaining_seconds(cost, block, reduction.between, left)
        enough = (rest[0] - rest >= takes).nonzero()[:, 0].tolist()
        least = enough[0] if enough else None
        found.append(BreakEven(block, count, 1e3 * takes, 1e3 * float(rest[0]), least))
    return found
