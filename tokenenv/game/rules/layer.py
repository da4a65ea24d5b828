"""What the rules with one agent per block have in common."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenenv.errors import UserError
from tokenenv.game.reduction import Moment
from tokenenv.game.rules.features import mean_over
from tokenenv.vit.backbone import Backbone

HISTORY_DIM = 3


def history(moment: Moment) -> Tensor:
    """``(B, 3)`` share of tokens left, share removed by the last decision, interventions so far.

    This is DORA-pruning's h_l (arXiv 2609.34325), except that the number of earlier decisions that
    removed something is divided by the number of this decision, counted from 1. All three lie in
    [0, 1].
    """
    counts = torch.stack(moment.counts, 1).float()
    left = counts[:, -1:] / counts[:, :1]
    if moment.step == 0:
        return torch.nn.functional.pad(left, (0, HISTORY_DIM - 1))
    before, after = counts[:, :-1], counts[:, 1:]
    last = 1 - after[:, -1:] / before[:, -1:].clamp(min=1)
    interventions = (after < before).sum(1, keepdim=True) / (moment.step + 1)
    return torch.cat([left, last, interventions], 1)


def one_hot_step(moment: Moment, steps: int) -> Tensor:
    """``(B, steps)`` one-hot number of the decision."""
    row = moment.tokens.size.new_zeros(len(moment.tokens.size), steps)
    row[:, moment.step] = 1.0
    return row


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
