"""Reading what a file of unknown origin says: JSON within limits, and values of the right kind."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tokenenv.errors import UserError

MOST_BYTES = 64 * 2**20
"""Size of the largest JSON file that is read."""

MOST_NESTED = 100
"""How deep lists and objects may lie in each other."""

FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What making an object of a file's values can raise if they don't belong together."""

_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


class Unfit(ValueError):
    """What a file says can't be used; the message is the reason, without the file's name."""


def reason_of(error: BaseException) -> str:
    """One line of an error's message: the last, where torch puts what is wrong; or its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__


@dataclass(frozen=True)
class Within:
    """A kind for :func:`fits`: a number from ``low`` to ``high``, a whole one if ``low`` is."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{_WORDS[type(self.low)]} from {self.low} to {self.high}"


def parse_json(text: str | bytes) -> Any:
    """JSON of finite numbers, at most :data:`MOST_NESTED` deep.

    Raises:
        Unfit: it is none.
    """
    try:
        found = json.loads(text, parse_constant=_refuse, parse_float=_finite, parse_int=_int64)
    except RecursionError:
        raise Unfit(f"nested deeper than {MOST_NESTED}") from None
    except Unfit:
        raise
    except ValueError as error:
        raise Unfit(f"no JSON, {type(error).__name__}") from None
    level, depth = [found], 0
    while level := [
        inner
        for outer in level
        if isinstance(outer, dict | list)
        for inner in (outer.values() if isinstance(outer, dict) else outer)
    ]:
        depth += 1
        if depth > MOST_NESTED:
            raise Unfit(f"nested deeper than {MOST_NESTED}")
    return found


def read_json(path: Path, remedy: str, blame: str = "") -> Any:
    """The JSON value in a file.

    Args:
        path: the file.
        remedy: what the user can do, the end of the message.
        blame: what is wrong, its start; empty: that ``path`` can't be read.

    Raises:
        UserError: there is no such file, it is too large, or not :func:`parse_json`'s.
    """
    with_reason = _complaint(path, remedy, blame)
    try:
        if path.exists() and not path.is_file():
            raise Unfit("no regular file")
        if path.stat().st_size > MOST_BYTES:
            raise Unfit(f"larger than {MOST_BYTES // 2**20} MiB")
        return parse_json(path.read_bytes())
    except Unfit as error:
        raise with_reason(str(error)) from None
    except OSError as error:
        raise with_reason(type(error).__name__) from None


def read_object(
    path: Path, kinds: Mapping[str, Any], remedy: str, blame: str = ""
) -> dict[str, Any]:
    """The JSON object in a file, with its fields checked as by :func:`check_fields`.

    Raises:
        UserError: as for :func:`read_json`, or it is no such object.
    """
    found = read_json(path, remedy, blame)
    try:
        check_fields(found, kinds)
    except Unfit as error:
        raise _complaint(path, remedy, blame)(str(error)) from None
    checked: dict[str, Any] = found
    return checked


def check_fields(found: Any, kinds: Mapping[str, Any], closed: bool = False) -> None:
    """Check that ``found`` is an object with fields of these kinds.

    Args:
        found: a JSON value.
        kinds: the kind of each field, as for :func:`fits`; one that None fits may be missing.
        closed: whether other fields are refused.

    Raises:
        Unfit: it is not; the message names the field.
    """
    if not isinstance(found, dict):
        raise Unfit(f"{found!r:.40} is no object")
    unknown = [key for key in found if key not in kinds]
    if closed and unknown:
        raise Unfit(f"unknown field '{unknown[0]:.40}'")
    for key, kind in kinds.items():
        if key not in found:
            if not fits(None, kind):
                raise Unfit(f"no '{key}'")
        elif not fits(found[key], kind):
            raise Unfit(f"'{key}' is {found[key]!r:.40}, not {_words(kind)}")


def check_annotated(values: Mapping[str, Any], annotated: Callable[..., Any]) -> None:
    """Check values against the annotations of the class or function that shall take them.

    Raises:
        Unfit: one is not what its annotation says; the message names it.
    """
    kinds = get_type_hints(annotated)
    for key, value in values.items():
        if key in kinds and not fits(value, kinds[key]):
            raise Unfit(f"'{key}' is {value!r:.40}, not {_words(kinds[key])}")


def fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value, or one with tuples for lists, is of a kind.

    Args:
        value: the value.
        kind: a type, such as an annotation, or a :class:`Within`. A whole number fits ``float``;
            True and False fit ``bool`` only. What is no kind of JSON's, such as a class of a
            user's own, fits everything.
    """
    if isinstance(kind, Within):
        inner = type(kind.low)
        return fits(value, inner) and kind.low <= value <= kind.high
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in args)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in args)
    if origin in (list, tuple, Sequence):
        if not isinstance(value, list | tuple):
            return False
        if origin is tuple and args[1:] != (...,):
            return len(value) == len(args) and all(map(fits, value, args))
        return all(fits(one, args[0]) for one in value)
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(
            fits(key, args[0]) and fits(one, args[1]) for key, one in value.items()
        )
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind if kind in _WORDS else True


def _words(kind: Any) -> str:
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(map(_words, get_args(kind)))
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    return _WORDS.get(kind) or str(kind)


def _complaint(path: Path, remedy: str, blame: str) -> Callable[[str], UserError]:
    """The error of a reason."""
    if blame:
        return lambda reason: UserError(f"{blame} ({path.name}: {reason}): {remedy}")
    return lambda reason: UserError(f"cannot read '{path}' ({reason}): {remedy}")


def _refuse(word: str) -> Any:
    raise Unfit(f"{word} is no finite number")


def _finite(word: str) -> float:
    return value if math.isfinite(value := float(word)) else _refuse(f"{word:.20}")


def _int64(word: str) -> int:
    if len(word) > 20 or not -(2**63) <= int(word) < 2**64:
        raise Unfit(f"{word:.20} is out of the range of whole numbers")
    return int(word)
