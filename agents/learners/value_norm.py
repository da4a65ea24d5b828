"""Running mean and standard deviation of returns."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from agents.workers import ALONE, Workers


class ValueNorm(nn.Module):
    """Running mean and standard deviation of returns; the critic predicts normalised values.

    A debiased exponential average as on-policy's ValueNorm, but only over the returns of active
    agents, updated once per rollout, with a faster decay (0.99 by default instead of 0.99999), and
    part of the checkpoint.
    """

    mean: Tensor
    square: Tensor
    weight: Tensor

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        for name in ("mean", "square", "weight"):
            # If the mean is large, the variance is a difference of large numbers.
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, values: Tensor, active: Tensor, workers: Workers = ALONE) -> None:
        """Update with all processes' ``values`` where ``active`` (same shape, bool) is true.

        Without any active value nothing changes.
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
        """Returns -> normalised values, which the critic predicts."""
        mean, spread = self._moments()
        return (values - mean) / spread

    def denormalise(self, values: Tensor) -> Tensor:
        """Normalised values, which the critic predicts -> returns."""
        mean, spread = self._moments()
        return values * spread + mean
