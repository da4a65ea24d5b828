"""Rules and reducers as JSON, and back: the name of a class and the values of its fields."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any


def describe(made: Any) -> dict[str, Any]:
    """A dataclass instance as JSON; :func:`remake` undoes it."""
    assert is_dataclass(made) and not isinstance(made, type)
    return {"class": type(made).__name__, **{f.name: getattr(made, f.name) for f in fields(made)}}


def remake(described: dict[str, Any], known: Iterable[type]) -> Any:
    """What :func:`describe` described.

    Args:
        described: from a file.
        known: the classes that it may be.

    Raises:
        KeyError: of an unknown class. TypeError: with fields that it does not have.
    """
    values: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in described.items()
    }
    classes = {cls.__name__: cls for cls in known}
    return classes[values.pop("class")](**values)
