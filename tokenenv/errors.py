"""The one exception a user's mistake ends in."""

from __future__ import annotations

import difflib
import functools
import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar, get_args

P = ParamSpec("P")
R = TypeVar("R")


class UserError(ValueError):
    """A mistake of the caller: one line that names the value and the remedy.

    The command line prints the line and exits with status 2; library users may catch it as
    a ``ValueError``.
    """


class UnknownArgument(UserError, TypeError):
    """A keyword argument that a function does not take; Python raises a ``TypeError`` for one."""


def why(error: Exception) -> str:
    """An error on one line: the message of a :class:`UserError`, else name and message."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}".rstrip(": ")


def check_interrupt(error: BaseException) -> None:
    """Raise ``KeyboardInterrupt`` if ``error`` arose from one, as code outside Python may do it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        seen = seen.__cause__ or seen.__context__


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'model'?"``, the end of a message, or nothing where no word is close."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise :class:`UserError` unless ``value`` is one of ``choices``, a ``Literal`` or a sequence.

    ``name``: what the message calls the value.
    """
    known = get_args(choices) or tuple(choices)
    if value not in known:
        raise UserError(f"{name}='{value}': choose from {', '.join(map(str, known))}")


def check_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function raise :class:`UnknownArgument` for a keyword that it does not take."""
    known = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in known:
                raise UnknownArgument(
                    f"{function.__name__}() has no argument '{name}': choose from "
                    f"{', '.join(known)}{did_you_mean(name, known)}"
                )
        return function(*args, **kwargs)

    return checked


def run_script(main: Callable[[], None]) -> None:
    """Run a script's ``main``; a user's mistake ends it in one line on stderr and status 2."""
    try:
        main()
    except UserError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
