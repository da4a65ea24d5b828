"""Several processes that train one model together, as ``torchrun`` starts them."""

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
"""How long a process that hangs is waited for; one that ends is missed at once."""

T = TypeVar("T")


@dataclass(frozen=True)
class Workers:
    """Who this process is among those that train together.

    What is exchanged is the same in all of them afterwards, to the last bit. Alone nothing is
    exchanged, and nothing is rounded differently.

    Attributes:
        rank: 0 for the one that prints and writes.
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
        said = torch.tensor(int(flag), device=_device())
        dist.all_reduce(said, dist.ReduceOp.MAX)
        return bool(said.item())

    def sum(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Every tensor's sum over the processes, in one exchange; added up in float64."""
        if self.count == 1:
            return tensors
        flat = torch.cat([tensor.flatten().double() for tensor in tensors])
        dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return tuple(p.view_as(t).to(t.dtype) for p, t in zip(parts, tensors, strict=True))

    def sum_gradients(
        self, gradients: Sequence[Tensor | None], like: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Every gradient's sum over the processes, in one exchange; None where nobody has one.

        Args:
            gradients: of this process, of one dtype.
            like: for each a tensor of its shape.
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
        *sums, voices = flat.split([*(part.numel() for part in parts), len(parts)])
        # An optimiser passes over a parameter without gradient, and moves one whose gradient is
        # zero. Reading the voices makes an accelerator wait: only who lacks one asks.
        if not all(there):
            there = [voice > 0 for voice in voices.tolist()]
        return [
            total.view_as(part) if yes else None
            for total, part, yes in zip(sums, parts, there, strict=True)
        ]

    def mean(self, numbers: Sequence[float], weight: int) -> list[float]:
        """Means over the processes of numbers that are means over ``weight`` things in each."""
        if self.count == 1:
            return list(numbers)
        mine = torch.tensor([*numbers, 1.0], dtype=torch.float64, device=_device()) * weight
        dist.all_reduce(mine)
        return (mine[:-1] / mine[-1]).tolist()

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank. For what is exchanged once: it is pickled."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A mistake that one process meets here ends all of them, and is said once.

        Nothing may be exchanged inside: who has met a mistake would take no part.

        Raises:
            UserError: in the first process. SystemExit: with status 2, in the others.
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
        """What to raise for a mistake that all processes meet: only the first says it."""
        return SystemExit(2) if self.rank else UserError(words)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Only the first process prints."""
        if not self.rank:
            yield
            return
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield


ALONE = Workers()


@dataclass(frozen=True)
class Rows:
    """The rows that this process has of a batch which lies in the processes one after the other.

    Attributes:
        workers: who shares the batch.
        first: position of the first row in the whole batch.
        here: rows in this process.
        total: rows in all.
    """

    workers: Workers = ALONE
    first: int = 0
    here: int = 0
    total: int = 0

    @staticmethod
    def of(workers: Workers, here: int) -> Rows:
        """Where ``here`` rows of this process lie; the processes tell each other how many."""
        if workers.count == 1:
            return Rows(workers, 0, here, here)
        counts = torch.zeros(workers.count, dtype=torch.int64, device=_device())
        counts[workers.rank] = here
        dist.all_reduce(counts)
        each = counts.tolist()
        return Rows(workers, sum(each[: workers.rank]), here, sum(each))

    def rand(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Uniform numbers for tensors of ``shape``, which has this process's rows.

        All processes draw those of the whole batch, each takes its own: who has how many makes no
        difference, and their generators stay in step.
        """
        if self.workers.count == 1:
            return torch.rand(tuple(shape), generator=generator, device=generator.device)
        whole = torch.rand((self.total, *shape[1:]), generator=generator, device=generator.device)
        return whole[self.first : self.first + self.here]

    def pick(self, order: Tensor) -> Tensor:
        """Of positions in steps x all rows those that are here, as positions in steps x here."""
        if self.workers.count == 1:
            return order
        row = order % self.total - self.first
        mine = (row >= 0) & (row < self.here)
        return (order // self.total * self.here + row)[mine]


WHOLE = Rows()


@contextlib.contextmanager
def join(device: str) -> Iterator[tuple[Workers, str]]:
    """The processes that ``torchrun`` started, or this one alone; and the device to work on.

    ``device``: as a user says it; of several GPUs each process gets its own.

    Raises:
        UserError: fewer GPUs than processes, processes that cannot find each other, or one of
            them ended or hangs.
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
            raise SystemExit(130) from None  # the first process says how it goes on
        raise
    except RuntimeError as error:
        # gloo's are plain ones; of anything else the traceback tells more.
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
    """Where the processes exchange numbers."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def _number(name: str, default: int | None = None) -> int:
    """What ``torchrun`` says in the environment."""
    text = os.environ.get(name, default)
    try:
        return int(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise UserError(
            f"WORLD_SIZE is set and {name}={text}: start several processes with torchrun, or "
            "unset WORLD_SIZE"
        ) from None


def _own_gpu(device: str, local: int, processes: int) -> str:
    """The GPU of this process, of those of its machine."""
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
    """The first sentence, without the place in the source code that gloo puts before it."""
    return str(error).partition("\n")[0].rpartition("] ")[2].partition(". ")[0]
