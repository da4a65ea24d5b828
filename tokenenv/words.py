"""Parser of the arguments behind a method's name: ``tome:r=8,blocks=0/1/2``."""

from __future__ import annotations

from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from tokenenv.errors import UserError

_READERS = {bool: "flag", int: "whole", float: "number", str: "text"}
"""The method of :class:`Words` that reads a plain type."""


def split_outside(text: str, mark: str) -> list[str]:
    """``text`` split at each character ``mark`` that stands in no brackets."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign == "(") - (sign == ")")
        if sign == mark and depth <= 0:
            parts.append("")
        else:
            parts[-1] += sign
    return parts


def is_readable(hint: Any) -> bool:
    """Whether :meth:`Words.value` reads words as this type."""
    if get_origin(hint) is tuple:
        return set(get_args(hint)) <= {int, Ellipsis}
    return hint in _READERS or get_origin(hint) is Literal


class Words:
    """The arguments ``key=value,key=value`` behind a method's name.

    Each can be read once; :meth:`check_all_read` finds those that no reader asked for.

    Args:
        what: the whole word that the user typed, for messages.
        rest: the arguments.
        usage: how the method is used, for messages.

    Raises:
        UserError: an argument without a value, or given twice. The readers raise it for an
            argument that is missing or has the wrong form.
    """

    def __init__(self, what: str, rest: str, usage: str) -> None:
        pairs = [part.partition("=") for part in split_outside(rest, ",") if part]
        if any(not sep or not value for _, sep, value in pairs):
            raise UserError(f"'{what}': arguments have the form key=value, separated by commas")
        self.what, self.usage = what, usage
        self._left = {key: value for key, _, value in pairs}
        if len(self._left) < len(pairs):
            raise UserError(f"'{what}': an argument is given twice: give each once")

    def check_all_read(self) -> None:
        """Raise :class:`UserError` if an argument was not read, since then it is unknown."""
        if self._left:
            raise UserError(
                f"'{self.what}': unknown argument '{next(iter(self._left))}': {self.usage}"
            )

    def blocks(self, default: tuple[int, ...]) -> tuple[int, ...]:
        """Read ``blocks``: block indices, or ranges such as ``3..11``, separated by ``/``."""
        text = self._left.pop("blocks", None)
        if text is None:
            return default
        try:
            found: list[int] = []
            for part in text.split("/"):
                low, dots, high = part.partition("..")
                first, last = int(low), int(high if dots else low)
                if not first <= last < 2**16:
                    raise ValueError
                found += range(first, last + 1)
            return tuple(found)
        except ValueError:
            raise UserError(
                f"'{self.what}': blocks={text} must be block indices such as 3/6/9 or 3..9"
            ) from None

    def seed(self) -> int:
        """Read ``seed``: a whole number from 0 to 2^63 - 1, by default 0."""
        text = self.text("seed", "0")
        if not (text.isascii() and text.isdigit() and int(text) < 2**63):
            raise UserError(f"'{self.what}': seed={text} must be a whole number from 0 to 2^63 - 1")
        return int(text)

    def has(self, key: str) -> bool:
        """Whether an argument was given and has not been read yet."""
        return key in self._left

    def number(self, key: str) -> float:
        """Read a number."""
        return self._float(key, self.text(key))

    def _float(self, key: str, text: str) -> float:
        try:
            return float(text)
        except ValueError:
            raise UserError(f"'{self.what}': {key}={text} is not a number") from None

    def range(self, key: str) -> float | tuple[float, float]:
        """Read one number, or two separated by ``..``."""
        text = self.text(key)
        low, two, high = text.partition("..")
        return (self._float(key, low), self._float(key, high)) if two else self._float(key, text)

    def numbers(self, key: str) -> tuple[float, ...]:
        """Read numbers separated by ``/``."""
        return tuple(self._float(key, text) for text in self.text(key).split("/"))

    def inside(self, key: str, word: str) -> str | None:
        """Read ``key=word(...)`` as what the brackets hold; None, and unread, of another form."""
        text = self._left.get(key, "")
        if not (text.startswith(f"{word}(") and text.endswith(")")):
            return None
        return self.text(key)[len(word) + 1 : -1]

    def wholes(self, key: str) -> tuple[int, ...]:
        """Read whole numbers separated by ``/``."""
        numbers = self.numbers(key)
        for value in numbers:
            if not value.is_integer() or abs(value) >= 2**31:
                raise UserError(f"'{self.what}': {key}={value:g} is not a whole number")
        return tuple(map(int, numbers))

    def whole(self, key: str) -> int:
        """Read one whole number."""
        numbers = self.wholes(key)
        if len(numbers) > 1:
            raise UserError(f"'{self.what}': {key} takes one number: {self.usage}")
        return numbers[0]

    def flag(self, key: str) -> bool:
        """Read 0 or 1, by default 1, as a bool."""
        text = self.text(key, "1")
        if text not in ("0", "1"):
            raise UserError(f"'{self.what}': {key}={text} must be 0 or 1")
        return text == "1"

    def choice(self, key: str, *known: str) -> str:
        """Read one of the words ``known``, by default the first."""
        text = self.text(key, known[0])
        if text not in known:
            raise UserError(f"'{self.what}': {key}={text}: choose from {', '.join(known)}")
        return text

    def text(self, key: str, default: str | None = None) -> str:
        """Read an argument as the text that was typed."""
        text = self._left.pop(key, default)
        if text is None:
            raise self.missing(key)
        return text

    def value(self, key: str, hint: Any, count: int) -> Any:
        """An argument that was given, read as the type of a field or parameter.

        Args:
            key: its name.
            hint: ``bool``, ``int``, ``float``, ``str``, a ``Literal``, or a tuple of whole numbers;
                of a union, such as ``float | None``, the first of these.
            count: how many numbers a tuple has where only one was given, which stands for all.

        Raises:
            UserError: the word is of another type, or no word can be read as ``hint``.
        """
        parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        hint = next((part for part in parts if is_readable(part)), None)
        if hint is None:
            raise UserError(
                f"'{self.what}': {key} can't be given as a word: only numbers, booleans, words and "
                "tuples of whole numbers can"
            )
        origin = get_origin(hint)
        if origin is Literal:
            return self.choice(key, *get_args(hint))
        if origin is tuple:
            numbers = self.wholes(key)
            return numbers * count if len(numbers) == 1 else numbers
        return getattr(self, _READERS[hint])(key)

    def missing(self, key: str) -> UserError:
        """The error to raise for a required argument that was not given."""
        return UserError(f"'{self.what}' needs {key}=...: {self.usage}")
