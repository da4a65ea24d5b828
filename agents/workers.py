"""Data-parallel training: the processes that ``torchrun`` starts, and what they exchange."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tokenenv.errors import UserError

_PATIENCE = timedelta(minutes=30)
"""How long to wait for a process that hangs; one that has ended is noticed at once."""

T = TypeVar("T")


@dataclass(frozen=True)
class Workers:
    """The processes that train together, seen from this one, and their exchanges.

    The result of every exchange is bitwise the same in all processes. A single process exchanges
    nothing, so its numbers are not rounded differently.

    Attributes:
        rank: number of this process; 0 prints and writes.
        count: number of processes.
    """

    rank: int = 0
    count: int = 1

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module, wrapped so that its gradients are averaged over all processes."""
        if self.count == 1:
            return module
        return nn.parallel.DistributedDataParallel(module)

    def alone(self, wrapped: nn.Module, yes: bool) -> AbstractContextManager[Any]:
        """A context that, if ``yes``, accumulates gradients without exchanging them."""
        if yes and isinstance(wrapped, nn.parallel.DistributedDataParallel):
            return wrapped.no_sync()
        return contextlib.nullcontext()

    def agree(self, flag: bool) -> bool:
        """Whether any of the processes passes True."""
        if self.count == 1:
            return flag
        said = torch.tensor(int(flag), device=_device())
        dist.all_reduce(said, dist.ReduceOp.MAX)
        return bool(said.item())

    def union(self, numbers: list[int]) -> list[int]:
        """The numbers that any of the processes passes, sorted, each once; there are few."""
        if not self.agree(bool(numbers)):
            return []
        return sorted({number for each in self.gather(numbers) for number in each})

    def sum(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The sum of each tensor over the processes, in one exchange; added in float64."""
        if self.count == 1:
            return tensors
        flat = torch.cat([tensor.flatten().double() for tensor in tensors])
        dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return tuple(p.view_as(t).to(t.dtype) for p, t in zip(parts, tensors, strict=True))

    def sum_gradients(
        self, gradients: Sequence[Tensor | None], like: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """The sum of each gradient over the processes, in one exchange.

        Args:
            gradients: this process's gradients, all of one dtype; None for a missing one.
            like: for each gradient a tensor of its shape.

        Returns:
            The sums; None if no process has that gradient.
        """
        if self.count == 1:
            return list(gradients)
        there = [gradient is not None for gradient in gradients]
        parts = [
            torch.zeros_like(shape) if gradient is None else gradient
            for gradient, shape in zip(gradients, like, strict=True)
        ]
        flat = torch.cat([*(part.flatten() for part in parts), parts[0].new_tensor(there)])
        dist.all_reduce(flat)
        *sums, owners = flat.split([*(part.numel() for part in parts), len(parts)])
        # An optimiser skips a parameter without a gradient but moves one with a zero gradient, so
        # None must stay None. Reading the values back synchronises; only a process that lacks a
        # gradient needs them.
        if not all(there):
            there = [count > 0 for count in owners.tolist()]
        return [
            total.view_as(part) if yes else None
            for total, part, yes in zip(sums, parts, there, strict=True)
        ]

    def mean(self, numbers: Sequence[float], weight: int) -> list[float]:
        """Weighted means over the processes; ``weight`` is this process's number of items."""
        if self.count == 1:
            return list(numbers)
        mine = torch.tensor([*numbers, 1.0], dtype=torch.float64, device=_device()) * weight
        dist.all_reduce(mine)
        return (mine[:-1] / mine[-1]).tolist()

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank. They are pickled; for rare exchanges only."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A context in which a ``UserError`` of one process ends all, with one message.

        Nothing may be exchanged inside, as a process that has failed would not take part.

        Raises:
            UserError: in the first process.
            SystemExit: with status 2, in the others.
        """
        mistake = None
        try:
            yield
        except UserError as error:
            if self.count == 1:
                raise
            mistake = str(error)
        met = [words for words in self.gather(mistake) if words is not None]
        if met:
            raise self.mistake(met[0]) from None

    def mistake(self, words: str) -> BaseException:
        """The exception for an error that all processes meet: only the first one shows it."""
        return SystemExit(2) if self.rank else UserError(words)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Silence all processes but the first."""
        if not self.rank:
            yield
            return
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield


ALONE = Workers()


@dataclass(frozen=True)
class Rows:
    """The rows of this process in a batch that is divided among processes in order of rank.

    Attributes:
        workers: the processes that share the batch.
        first: position of this process's first row in the whole batch.
        here: number of rows in this process.
        total: number of rows in all processes.
    """

    workers: Workers = ALONE
    first: int = 0
    here: int = 0
    total: int = 0

    @staticmethod
    def of(workers: Workers, here: int) -> Rows:
        """The rows of this process, which has ``here``; exchanges the numbers of all."""
        if workers.count == 1:
            return Rows(workers, 0, here, here)
        counts = torch.zeros(workers.count, dtype=torch.int64, device=_device())
        counts[workers.rank] = here
        dist.all_reduce(counts)
        each = counts.tolist()
        return Rows(workers, sum(each[: workers.rank]), here, sum(each))

    def rand(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Uniform random numbers of ``shape``, whose first dimension is this process's rows.

        All processes draw the numbers of the whole batch and take their own rows. The numbers so
        do not depend on the division, and the generators stay in the same state.
        """
        if self.workers.count == 1:
            return torch.rand(tuple(shape), generator=generator, device=generator.device)
        whole = torch.rand((self.total, *shape[1:]), generator=generator, device=generator.device)
        return whole[self.first : self.first + self.here]

    def pick(self, order: Tensor) -> Tensor:
        """The positions of this process, of those in steps x total, as ones in steps x here."""
        if self.workers.count == 1:
            return order
        row = order % self.total - self.first
        mine = (row >= 0) & (row < self.here)
        return (order // self.total * self.here + row)[mine]


WHOLE = Rows()


@contextlib.contextmanager
def join(device: str) -> Iterator[tuple[Workers, str]]:
    """A context with the processes that ``torchrun`` started, or this one, and the device.

    ``device``: as the user gives it; with several GPUs each process gets its own.

    Raises:
        UserError: fewer GPUs than processes, the processes cannot connect, or one of them has
            ended or hangs.
    """
    count = _number("WORLD_SIZE", 1)
    if count == 1:
        yield ALONE, device
        return
    rank, local = _number("RANK"), _number("LOCAL_RANK", 0)
    if device.startswith("cuda"):
        device = _own_gpu(device, local, _number("LOCAL_WORLD_SIZE", count))
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if "cuda" in device else "gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"process {rank} of {count} cannot find the others ({_first_line(error)}): start them "
            "with torchrun"
        ) from None
    try:
        yield Workers(rank, count), device
    except KeyboardInterrupt:
        if rank:
            raise SystemExit(130) from None  # the first process prints how to resume
        raise
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors; of any other error the traceback is more useful.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise UserError(
            f"process {rank} of {count} stops, because another one ended or does not answer "
            f"({_first_line(error)}): see what that one said; the same command with --out and "
            "--resume goes on from the last checkpoint"
        ) from None
    finally:
        dist.destroy_process_group()


def _device() -> str:
    """The device on which the processes exchange tensors."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def _number(name: str, default: int | None = None) -> int:
    """A number that ``torchrun`` sets in the environment."""
    text = os.environ.get(name, default)
    try:
        return int(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise UserError(
            f"WORLD_SIZE is set and {name}={text}: start several processes with torchrun, or "
            "unset WORLD_SIZE"
        ) from None


def _own_gpu(device: str, local: int, processes: int) -> str:
    """The name of this process's GPU among those of its machine."""
    found = torch.cuda.device_count()
    if device == "cuda" and processes <= found:
        return f"cuda:{local}"
    words = f"--device {device} is one GPU for {processes} processes: use --device cuda"
    if device == "cuda":
        words = (
            f"{processes} processes on this machine share {found} GPUs: start as many as there "
            "are GPUs with --nproc-per-node, or use --device cpu"
        )
    raise SystemExit(2) if local else UserError(words)


def _first_line(error: Exception) -> str:
    """The first line of an error, without the source location that gloo puts before it."""
    return str(error).partition("\n")[0].rpartition("] ")[2].partition(". ")[0]
