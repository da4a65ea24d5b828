"""Several processes that train one model together, as ``torchrun`` starts them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

_PATIENCE = timedelta(hours=6)
"""How long the others wait while the first judges a policy."""


@dataclass(frozen=True)
class Workers:
    """Who this process is among those that train together.

    Attributes:
        rank: 0 for the one that judges, prints and writes.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module, whose gradients become the mean over all processes."""
        if self.count == 1:
            return module
        return nn.parallel.DistributedDataParallel(module)

    def alone(self, wrapped: nn.Module, yes: bool) -> AbstractContextManager[Any]:
        """Where ``yes``, gradients add up here before they are exchanged."""
        if yes and isinstance(wrapped, nn.parallel.DistributedDataParallel):
            return wrapped.no_sync()
        return contextlib.nullcontext()

    def agree(self, flag: bool) -> bool:
        """Whether any of the processes says so."""
        if self.count == 1:
            return flag
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        said = torch.tensor(int(flag), device=device)
        dist.all_reduce(said, dist.ReduceOp.MAX)
        return bool(said.item())


@contextlib.contextmanager
def join(device: str) -> Iterator[tuple[Workers, str]]:
    """The processes that ``torchrun`` started, or this one alone; and the device to work on.

    ``device``: as a user says it; of several GPUs each process gets its own.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Workers(), device
        return
    rank = int(os.environ["RANK"])
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if "cuda" in device else "gloo", timeout=_PATIENCE)
    try:
        yield Workers(rank, count), device
    finally:
        dist.destroy_process_group()
