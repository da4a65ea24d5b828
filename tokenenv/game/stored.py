"""Rules and reducers as JSON and back: the name of the class and the values of its fields."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any

from tokenenv.artefact import Unfit, check_annotated, check_fields
from tokenenv.errors import UserError
from tokenenv.own import REGISTER, is_packaged, load_origin, origin_of


def describe(made: Any) -> dict[str, Any]:
    """A dataclass instance as JSON values; :func:`remake` is the inverse."""
    assert is_dataclass(made) and not isinstance(made, type)
    values = {field.name: getattr(made, field.name) for field in fields(made)}
    return {"class": type(made).__name__, **values, **with_origin(type(made))}


def with_origin(cls: type) -> dict[str, Any]:
    """The origin of a user's own class as a field of a config; empty for the package's classes."""
    origin = origin_of(cls)
    return {} if origin is None else {"origin": origin}


def remake(described: dict[str, Any], known: Iterable[type], trust: bool = False) -> Any:
    """The instance that :func:`describe` described.

    Args:
        described: the JSON object, from a file.
        known: the classes that are allowed without ``trust``.
        trust: whether the code that defines another class may be run.

    Raises:
        Unfit: no class is named, or a field is not what its annotation says.
        TypeError: the class does not have such fields.
        UserError: the class is unknown; or it is a user's own and ``trust`` is False, or it is not
            found.
    """
    check_fields(described, {"class": str})
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in described.items()
    }
    cls = find_class(values, known, trust)
    check_annotated(values, cls)
    return cls(**values)


def find_class(config: dict[str, Any], known: Iterable[type], trust: bool) -> Any:
    """The class that a config names; removes ``class`` and ``origin`` from the config.

    A user's class may have the name of one of the package's: its origin tells them apart.

    Args:
        config: it has a ``class``.
        known: as for :func:`remake`.
        trust: as for :func:`remake`.

    Raises:
        Unfit: the class's name is no text.
        UserError: the class is unknown; or as for :func:`remake`.
    """
    name, origin = config.pop("class"), config.pop("origin", None)
    if isinstance(origin, dict):  # a subclass may have its base's config
        name = origin.get("name", name)
    if not isinstance(name, str):
        raise Unfit(f"'class' is {name!r:.40}, not text")
    found = {cls.__name__: cls for cls in known}.get(name)
    if found is not None and (origin is None or not is_packaged(found)):
        return found
    if origin is None:
        raise UserError(
            f"it holds a '{name}', and no class of that name is registered: import and register "
            f"yours ({REGISTER}) before loading"
        )
    if trust:
        return load_origin(origin)
    place = origin.get("module") or origin.get("file") if isinstance(origin, dict) else origin
    raise UserError(
        f"it holds a '{name}' of {place!r}, which is a user's own code: to run it, "
        f"give trust=True (--trust), or import the class yourself and register it ({REGISTER})"
    )
