"""Paths as users give them: those that no system call takes are refused before any work."""

from __future__ import annotations

import os
from pathlib import Path

from tokenenv.errors import UserError

_LONGEST_NAME, _LONGEST = 255, 4095
"""Bytes of a name and of a path, on the file systems that people have."""


def path_text(path: str | os.PathLike[str], name: str) -> str:
    """A path as text.

    Args:
        path: what the user gave.
        name: of the option or argument, for messages.

    Raises:
        UserError: it is no path, empty, too long, not UTF-8, or holds a NUL.
    """
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"{name}={path!r:.60} is no path: give text, or a pathlib.Path")
    text = os.fsdecode(path)
    if not text:
        raise UserError(f"{name} is empty: give a name, or leave it out")
    if "\0" in text:
        raise UserError(f"{name}={text!r:.60} holds a NUL, which no path can: give another")
    try:
        longest = max(len(part.encode()) for part in [*Path(text).parts, ""])
        whole = len(text.encode())
    except UnicodeEncodeError:
        raise UserError(
            f"{name}={text!r:.60} is not UTF-8, and not all libraries can open it: rename it"
        ) from None
    if longest > _LONGEST_NAME or whole > _LONGEST:
        raise UserError(
            f"{name}='{text:.40}...' is too long: a name has up to {_LONGEST_NAME} bytes, a path "
            f"up to {_LONGEST}"
        )
    return text


def as_path(path: str | os.PathLike[str], name: str) -> Path:
    """:func:`path_text` as a ``Path``; an error as there."""
    return Path(path_text(path, name))
