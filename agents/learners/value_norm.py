"""Running mean and spread of returns."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from agents.workers import ALONE, Workers


class ValueNorm(nn.Module):
    """Running mean and spread of returns; the critic predicts normalised values.

    A debiased exponential average (on-policy's ValueNorm), but over the returns of active agents
    only, once per rollout, with a decay that forgets (0.99 by default; the reference's 0.99999
    hardly does), and part of the checkpoint.
    """

    mean: Tensor
    square: Tensor
    weight: Tensor

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        for name in ("mean", "square", "weight"):
            # The spread is a difference of large numbers where the mean is large.
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, values: Tensor, active: Tensor, workers: Workers = ALONE) -> None:
        """Take in all processes' ``values`` where ``active`` (same shape, bool).

        None active: nothing changes.
        """
        taken = torch.where(active, values, 0.0).double()
        count, total, squares = workers.sum(active.sum(), taken.sum(), (taken**2).sum())
        keep = torch.where(count > 0, self.decay, 1.0)
        count = count.clamp(min=1)
        mean, square = total / count, squares / count
        self.mean.mul_(keep).add_((1 - keep) * mean)
        self.square.mul_(keep).add_((1 - keep) * square)
        self.weight.mul_(keep).add_(1 - keep)

    def _moments(self) -> tuple[Tensor, Tensor]:
        weight = self.weight.clamp(min=1e-8)
        mean = self.mean / weight
        spread = (self.square / weight - mean**2).clamp(min=0).sqrt()
        started = self.weight > 0
        return mean.float(), torch.where(started, spread.clamp(min=1e-4), 1.0).float()

    def normalise(self, values: Tensor) -> Tensor:
        """Returns -> what the critic predicts."""
        mean, spread = self._moments()
        return (values - mean) / spread

    def denormalise(self, values: Tensor) -> Tensor:
        """What the critic predicts -> returns."""
        mean, spread = self._moments()
        return values * spread + mean
