"""What the rules with one agent per block have in common."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenenv.errors import UserError
from tokenenv.game.reduction import Moment
from tokenenv.game.rules.features import mean_over, one_hots
from tokenenv.vit.backbone import Backbone

HISTORY_DIM = 3


def history(moment: Moment) -> Tensor:
    """``(B, 3)`` share of tokens left, share removed by the last decision, interventions so far.

    This is DORA-pruning's h_l (arXiv 2609.34325), except that the number of earlier decisions that
    removed something is divided by the number of this decision, counted from 1. All three lie in
    [0, 1].
    """
    first, last = moment.counts[0], moment.counts[-1]
    left = last / first
    if moment.step == 0:
        return F.pad(left[:, None], (0, HISTORY_DIM - 1))
    removed = 1 - last / moment.counts[-2].clamp(min=1)
    counts = torch.stack(moment.counts)
    interventions = (counts[1:] < counts[:-1]).sum(0) / (moment.step + 1)
    return torch.stack([left, removed, interventions], 1)


def one_hot_step(moment: Moment, steps: int) -> Tensor:
    """``(B, steps)`` one-hot number of the decision."""
    size = moment.tokens.size
    return one_hots(steps, size.device)[moment.step].expand(size.shape[0], steps)


def state(backbone: Backbone, moment: Moment, steps: int) -> Tensor:
    """``(B, S)`` normalised summary token, one-hot decision, and history; S as state_dim."""
    whole = F.layer_norm(backbone.summary(moment.tokens), (backbone.dim,))
    return torch.cat([whole, one_hot_step(moment, steps), history(moment)], 1)


def state_dim(backbone: Backbone, steps: int) -> int:
    """Width of :func:`state`."""
    return backbone.dim + steps + HISTORY_DIM


def mean_key(backbone: Backbone, keys: Tensor, active: Tensor, prefix: int) -> Tensor:
    """``(B, K)`` the class token's key, all heads concatenated; without one the mean key."""
    flat = keys.transpose(1, 2).flatten(2).float()
    return flat[:, 0] if backbone.has_class_token else mean_over(flat[:, prefix:], active)


def decision_blocks(depth: int, max_cycles: int | None) -> tuple[int, ...]:
    """All of a model's ``depth`` blocks, or ``max_cycles`` spread evenly, the last included.

    Raises:
        UserError: ``max_cycles`` is not in 1 to ``depth``.
    """
    count = depth if max_cycles is None else max_cycles
    if not 1 <= count <= depth:
        raise UserError(
            f"max_cycles={count} decisions don't fit the model's {depth} blocks: "
            f"choose 1 to {depth}"
        )
    return tuple(round((i + 1) * depth / count) - 1 for i in range(count))
