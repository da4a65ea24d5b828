"""Writing files atomically: safetensors with JSON in the header (no pickle), JSON, folders."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tokenenv.artefact import FAULTS, Unfit, check_fields, parse_json
from tokenenv.errors import UserError

LOCK = ".lock"
"""Name of the file that locks a folder while a process writes to it."""


def write_tensors(path: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write ``tensors``, with ``config`` as JSON in the header, atomically as :func:`write_bytes`.

    Raises:
        UserError: the file cannot be written.
    """
    data = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    write_bytes(path, save(data, {"tokenenv": json.dumps(config)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the config that :func:`write_tensors` wrote.

    Raises:
        UserError: the file is unreadable, or was not written by this function.
    """
    try:
        if path.exists() and not path.is_file():
            raise Unfit("no regular file")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies: get_tensor() maps the file, so later writes to it would change the tensors.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        config = parse_json(metadata["tokenenv"])
        check_fields(config, {})
        return tensors, config
    except (OSError, SafetensorError, *FAULTS) as error:
        reason = error if isinstance(error, Unfit) else type(error).__name__
        raise UserError(
            f"cannot read '{path}' as a file of tokenenv ({reason}): "
            "is it complete, and written by tokenenv?"
        ) from None


def check_values(
    tensors: dict[str, Tensor], own: dict[str, Tensor], where: str, remedy: str
) -> None:
    """Refuse values that would load without an error and compute nonsense.

    Args:
        tensors: what a file holds, by name.
        own: the tensors that they replace, by name. A value has to stay finite in the type of its
            own tensor, and floating-point numbers replace floating-point numbers only.
        where: words for the file.
        remedy: what the user can do.

    Raises:
        UserError: it names the tensor.
    """
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise UserError(f"{where}: tensor '{name}' is sparse, quantised or empty: {remedy}")
        mine = own.get(name, tensor)
        if _kind(tensor) != _kind(mine):
            raise UserError(
                f"{where}: tensor '{name}' holds {_plain(tensor)}, not {_plain(mine)} numbers: "
                f"{remedy}"
            )
        # A byte is too narrow for torch to compare.
        wide = tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
        if not wide.to(mine.dtype).isfinite().all():
            raise UserError(f"{where}: tensor '{name}' holds NaN or infinite values: {remedy}")


def _kind(tensor: Tensor) -> str:
    if tensor.is_floating_point():
        return "floating-point"
    if tensor.is_complex():
        return "complex"
    return "bool" if tensor.dtype == torch.bool else "whole"


def _plain(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, atomically as :func:`write_bytes`.

    Raises:
        UserError: the file cannot be written.
    """
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: a reader, or a crash, finds the old file or the new one.

    Of several processes that write the same file at once, the last one's content stays. A link
    stays a link to the file that is written. What exists and is neither a file nor a folder, such
    as ``/dev/null`` or a FIFO, is written to and never replaced.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        if is_stream(path):
            with open(path, "wb", buffering=0) as stream:
                stream.write(content)
            return
        target = Path(os.path.realpath(path))
        if target.is_symlink():  # it leads round in a circle
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        _replace(target, content)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write '{path}' ({reason}): choose another place") from None


def is_stream(path: Path) -> bool:
    """Whether ``path`` exists and is neither a file nor a folder: a device, a FIFO, a socket."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{secrets.token_hex(8)}.part")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave an empty file under the name
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def check_new(folder: Path) -> None:
    """Raise :class:`UserError` unless a folder does not exist yet, or is empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"'{folder}' exists already: choose another folder")


@contextlib.contextmanager
def writable_folder(folder: Path) -> Iterator[None]:
    """Create ``folder`` if needed and check that it is writable; remove it if it stays empty.

    Raises:
        UserError: the folder cannot be created or written to.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot write to '{folder}' ({reason}): choose another") from None
        yield
    finally:
        with contextlib.suppress(OSError):  # stops at the first folder that is not empty
            for place in made:
                place.rmdir()


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to that becomes ``folder`` when this ends; after an error nothing is left.

    Yields:
        The folder to write to, beside ``folder``.

    Raises:
        UserError: ``folder`` is a file, holds files, or can't be written.
    """
    try:
        check_new(folder)
        target = folder.resolve()  # a link stays one
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as place:
            complete = Path(place, "complete")
            complete.mkdir()
            yield complete
            complete.replace(target)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write to '{folder}' ({reason}): choose another") from None


@contextlib.contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """:func:`writable_folder`, which no other process may have at the same time.

    The lock is a file in it, which goes when this ends; what a killed process left locks nothing.

    Raises:
        UserError: it cannot be made, written to or locked, or another process has it.
    """
    with writable_folder(folder):
        file = folder / LOCK
        lock = FileLock(file)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise UserError(
                f"another process is writing to '{folder}': wait until it ends, or choose another"
            ) from None
        except (OSError, NotImplementedError) as error:
            raise UserError(
                f"cannot lock '{folder}' ({error}): choose one on another file system"
            ) from None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                file.unlink()  # before it is released, or it could be another process's by then
            lock.release()


def flatten_state(prefix: str, state: Any, tensors: dict[str, Tensor]) -> Any:
    """Move the tensors of a nested state dict into ``tensors``; returns the rest as JSON.

    Raises:
        TypeError: a value is no dict, list, tuple, tensor, None, bool, number or string.
    """
    if isinstance(state, Tensor):
        name = prefix
        while name in tensors:  # {"a.b": x, "a": {"b": y}}
            name += "'"
        tensors[name] = state
        return {"tensor": name}
    if isinstance(state, dict):
        items = [[k, flatten_state(f"{prefix}.{k}", v, tensors)] for k, v in state.items()]
        return {"dict": items}
    if isinstance(state, list | tuple):
        return {"list": [flatten_state(f"{prefix}.{i}", v, tensors) for i, v in enumerate(state)]}
    if state is None or isinstance(state, bool | int | float | str):
        return {"value": state}
    raise TypeError(f"cannot store a {type(state).__name__} at {prefix}")


def unflatten_state(skeleton: Any, tensors: dict[str, Tensor]) -> Any:
    """Undo :func:`flatten_state`; tuples come back as lists.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: ``skeleton`` is none of its making.
    """
    ((kind, value),) = skeleton.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {k: unflatten_state(v, tensors) for k, v in value}
    if kind == "list":
        return [unflatten_state(v, tensors) for v in value]
    if kind == "value":
        return value
    raise KeyError(kind)
