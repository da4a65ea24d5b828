"""Masked losses and statistics of PPO, in one process or several."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from agents.policies.trainable import Columns
from agents.workers import ALONE, Workers

AdvantageNorm = Literal["global", "per_agent"]
"""Over which agents advantages are normalised, see :func:`normalise_advantage`."""

Size = dict[str, Tensor]
"""The sums that :func:`measure` returns for a minibatch."""


def measure(mask: Columns, value: Columns, returns: Tensor) -> Size:
    """Numbers of log-probabilities and of values that count, per head; and the sum of returns.

    Args:
        mask: a rollout's masks, the first head first.
        value: a rollout's values.
        returns: shape of the first head's values.
    """
    counts = {name: counting(mask[name], value[name]) for name in mask}
    first = next(iter(counts.values()))
    return {
        **{name: there.sum() for name, there in mask.items()},
        **{f"values of {name}": there.sum() for name, there in counts.items()},
        "returns": torch.where(first, returns, 0.0).sum(),
    }


def counting(mask: Tensor, value: Tensor) -> Tensor:
    """Which values count: the head's mask, or, for one value per copy, whether any entry does."""
    return mask if mask.shape == value.shape else mask.any(-1, keepdim=True)


def surgery(
    one: tuple[Tensor | None, ...], other: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """PCGrad (Yu et al. 2020) for two losses: the sum of their projected gradients.

    If the two have a negative dot product, each loses its component along the other. Where only one
    loss has a gradient (the other's is None), the missing one counts as zeros, as it does in the
    flat vectors of all parameters that the paper projects.
    """
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    dot = sum(((a * b).sum() for a, b in pairs), torch.zeros(()))
    conflict = torch.as_tensor(dot).clamp(max=0)
    lengths = [sum((g**2).sum() for g in part if g is not None) for part in (one, other)]
    result: list[Tensor | None] = []
    for a, b in zip(one, other, strict=True):
        known = b if a is None else a
        if known is None:
            result.append(None)
            continue
        a = torch.zeros_like(known) if a is None else a
        b = torch.zeros_like(known) if b is None else b
        first = a - conflict / (lengths[1] + 1e-12) * b
        second = b - conflict / (lengths[0] + 1e-12) * a
        result.append(first + second)
    return result


def masked_mean(values: Tensor, mask: Tensor, count: Tensor | None = None) -> Tensor:
    """Mean of ``values`` where ``mask`` is true; 0 if it is nowhere.

    ``count``: number of true entries in all processes. The results of the processes then add up to
    the mean over all.
    """
    count = mask.sum() if count is None else count
    return torch.where(mask, values, 0.0).sum() / count.clamp(min=1)


def normalise_advantage(
    advantage: Tensor,
    active: Tensor,
    over: AdvantageNorm,
    workers: Workers = ALONE,
) -> Tensor:
    """Advantages ``(T, B, A)`` scaled to mean 0 and standard deviation 1 over active agents.

    Either over all agents or for each agent separately; the statistics are those of all processes.
    """
    dims = (0, 1, 2) if over == "global" else (0, 1)
    count, total = workers.sum(
        active.sum(dims, keepdim=True), torch.where(active, advantage, 0.0).sum(dims, keepdim=True)
    )
    count = count.clamp(min=1)
    centred = torch.where(active, advantage - total / count, 0.0)
    (squares,) = workers.sum((centred**2).sum(dims, keepdim=True))
    return centred / (squares / count + 1e-10).sqrt()


def centre_groups(advantage: Tensor, active: Tensor, repeats: int, own: bool = False) -> Tensor:
    """Subtract from ``(T, B, A)`` a baseline of the image, from all its repeats.

    Args:
        advantage: ``(T, B, A)``; the ``repeats`` copies of an image follow each other in B.
        active: ``(T, B, A)`` bool, which entries count.
        repeats: copies of each image.
        own: whether each agent has a baseline of its own, the mean of its advantages in the
            repeats in which it is active, as independent learners have to; otherwise it is the
            mean over all active agents of all repeats.

    Returns:
        ``(T, B, A)``, 0 where not active.
    """
    groups = (len(advantage), -1, repeats, advantage.shape[2])
    values, mask = advantage.reshape(groups), active.reshape(groups)
    over = (2,) if own else (2, 3)
    count = mask.sum(over, keepdim=True).clamp(min=1)
    mean = torch.where(mask, values, 0.0).sum(over, keepdim=True) / count
    return torch.where(mask, values - mean, 0.0).reshape(advantage.shape)


def policy_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    active: Tensor,
    clip: float,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7) over active agents.

    Tensors are ``(..., A)``; ``count`` as for :func:`masked_mean`. Returns the loss and the share
    of clipped ratios.
    """
    # The ratio of an inactive agent is meaningless, and inf * 0 would be NaN.
    ratio = torch.where(active, log_prob - old_log_prob, 0.0).exp()
    surrogate = torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    clipped = masked_mean(((ratio - 1).abs() > clip).float(), active, count)
    return -masked_mean(surrogate, active, count), clipped.detach()


def value_loss(
    value: Tensor,
    old_value: Tensor,
    returns: Tensor,
    active: Tensor,
    *,
    clip: float | None,
    huber_delta: float,
    count: Tensor | None = None,
) -> Tensor:
    """Squared or Huber error, the larger of unclipped and clipped, mean over active agents.

    ``count`` as for :func:`masked_mean`.
    """

    def error(prediction: Tensor) -> Tensor:
        if huber_delta:
            return F.huber_loss(prediction, returns, reduction="none", delta=huber_delta)
        return 0.5 * (prediction - returns) ** 2

    loss = error(value)
    if clip is not None:
        loss = torch.max(loss, error(old_value + (value - old_value).clamp(-clip, clip)))
    return masked_mean(loss, active, count)
