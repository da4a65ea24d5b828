"""Standard output and error that end no work: closed, full, or unable to show a character."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


class SturdyStream:
    """A text stream that goes on after it could not be written to; the rest is thrown away.

    A reader that has gone (``BrokenPipeError``) still ends the command.

    Args:
        stream: standard output or error.

    Attributes:
        lost: why it could not be written to; None if it could.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write ``text``, with escapes for what the stream's encoding has no characters."""
        if self.lost is None:
            try:
                self._stream.write(text)
            except UnicodeEncodeError as error:
                shown = text.encode(error.encoding, "backslashreplace").decode(error.encoding)
                self._stream.write(shown)
            except BrokenPipeError:
                raise
            except OSError as error:
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered."""
        if self.lost is None:
            try:
                self._stream.flush()
            except BrokenPipeError:
                raise
            except OSError as error:
                self._lose(error)

    def _lose(self, error: OSError) -> None:
        self.lost = error
        leave_stream(self._stream)


def leave_stream(stream: Any) -> None:
    """Send what a stream still holds nowhere, or Python would write it when it exits."""
    with contextlib.suppress(OSError, ValueError):  # a stream of no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def sturdy_streams() -> Iterator[SturdyStream]:
    """A context in which printing does not fail; yields what stands for standard output.

    Where the shell closed a standard stream (``2>&-``), it leads nowhere, and no file that is
    opened later gets its number.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest free number
    before = sys.stdout, sys.stderr
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  (until Python ends)
    out, err = SturdyStream(sys.stdout), SturdyStream(sys.stderr)
    sys.stdout, sys.stderr = out, err  # type: ignore[assignment]
    try:
        yield out
    finally:
        sys.stdout, sys.stderr = before
