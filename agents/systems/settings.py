"""Settings of a system as ``--set key=value`` words."""

from __future__ import annotations

import dataclasses
import inspect
import math
import typing
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from tokenenv.errors import UserError


class Settings(Protocol):
    """A frozen dataclass of settings with defaults, which are for an ImageNet model."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @classmethod
    def for_digits(cls) -> Settings:
        """The settings for the embedded models.

        Where four times the tokens need others the class has a ``for_large_digits`` beside it.
        """

    def implied(self, given: dict[str, Any]) -> dict[str, Any]:
        """Settings that those ``given`` in place of these bring with them."""


C = TypeVar("C", bound=Settings)

Check = tuple[Callable[[Any], bool], str]
"""Whether a value will do, and words for those that will."""

_FROM_ONE: Check = (lambda v: v >= 1, "at least 1")
_FROM_ZERO: Check = (lambda v: v >= 0, "at least 0")
_POSITIVE: Check = (lambda v: v > 0, "greater than 0")
_PERCENT: Check = (lambda v: 0 < v < 100, "between 0 and 100")
_SHARE: Check = (lambda v: 0 <= v <= 1, "from 0 to 1")
_NOT_ALL: Check = (lambda v: 0 <= v < 1, "from 0 to below 1")
_PART: Check = (lambda v: 0 < v < 1, "between 0 and 1")
_CHECKS: dict[str, Check] = {
    **dict.fromkeys(("updates", "batch", "repeats", "evaluate_every"), _FROM_ONE),
    **dict.fromkeys(("epochs", "minibatches", "critic_width", "budget_step"), _FROM_ONE),
    **dict.fromkeys(("alpha", "beta", "entropy", "calibrate", "critic_depth", "width"), _FROM_ZERO),
    **dict.fromkeys(("lr", "critic_lr", "clip"), _POSITIVE),
    "penalty": (lambda v: 0 < v <= 1e6, "above 0 and at most 1e6"),
    **dict.fromkeys(("accumulate",), _FROM_ONE),
    **dict.fromkeys(("min_lr", "weight_decay", "mixup", "cutmix", "class_loss"), _FROM_ZERO),
    **dict.fromkeys(("logit_loss", "token_loss"), _FROM_ZERO),
    **dict.fromkeys(("gamma", "lam", "target_drop", "hflip", "ratio"), _SHARE),
    "eta": _FROM_ZERO,
    **dict.fromkeys(("warmup", "ema", "smoothing", "skip"), _NOT_ALL),
    **dict.fromkeys(("keep", "crop"), (lambda v: 0 < v <= 1, "above 0 and at most 1")),
    "added_rate": _POSITIVE,
    **dict.fromkeys(("held_back", "initial_keep", "initial_merge", "initial_gate"), _PART),
    "target_saving": _PERCENT,
    "initial_budget": (
        lambda v: bool(v) and min(v) >= 1,
        "one or more numbers from 1, such as 12 or 40/20/10",
    ),
    "hidden": (lambda v: bool(v) and min(v) >= 1, "one or more widths, such as 64/64"),
    "features": (bool, "one or more names, separated by slashes"),
}


def preset(cls: type[C], model: str | None) -> C:
    """The settings that a system starts from on a model; None is the embedded one."""
    from tokenenv.vit.load import DIGITS_MODELS, EMBEDDED  # heavy: a command's help does without

    if model not in (None, *DIGITS_MODELS):
        return cls()
    made = cls.for_digits() if model in (None, EMBEDDED) else _for_large_digits(cls)
    return typing.cast(C, made)


def _for_large_digits(cls: type[Settings]) -> Settings:
    make: Callable[[], Settings] = getattr(cls, "for_large_digits", cls.for_digits)
    return make()


def check_settings(config: Any) -> None:
    """Raise :class:`UserError` where a setting is out of its range."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for key, value in vars(config).items():
        fits, words = _CHECKS.get(key, (lambda v: True, ""))
        numbers = value if isinstance(value, tuple) else (value,)
        problem = ""
        if isinstance(defaults[key], tuple) and not isinstance(value, tuple):
            problem = f"a tuple, such as {defaults[key]}"
        elif any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            problem = "a finite number" if len(numbers) == 1 else "finite numbers"
        elif not fits(value):
            problem = words
        if problem:
            raise UserError(f"{key}={word(value)} doesn't do: it must be {problem}")


def with_settings(config: C, settings: list[str]) -> C:
    """``config`` with ``key=value`` words applied; lists are separated by slashes or commas.

    Raises:
        UserError: unknown key, or a value of the wrong type.
    """
    hints = _hints(type(config))
    values: dict[str, Any] = {}
    for setting in settings:
        key, sep, text = setting.partition("=")
        if not sep:
            raise UserError(f"--set {setting}: the form is key=value")
        if key not in hints:
            raise UserError(f"--set {setting}: unknown key; choose from {', '.join(sorted(hints))}")
        try:
            values[key] = _parse(hints[key], text)
        except ValueError:
            raise UserError(f"--set {setting}: {key} takes {_describe(hints[key])}") from None
    return dataclasses.replace(config, **{**config.implied(values), **values})


def settings_help(cls: type[Settings]) -> str:
    """Every setting with its default, then what each of them means."""
    from tokenenv.vit.load import DIGITS_MODELS

    presets = {name: vars(preset(cls, name)) for name in DIGITS_MODELS}
    defaults = []
    for key, value in vars(cls()).items():
        models: dict[str, list[str]] = {}
        for name, settings in presets.items():
            models.setdefault(word(settings[key]) or "empty", []).append(name)
        told = "; ".join(f"{' and '.join(names)}: {text}" for text, names in models.items())
        other = f"  ({told})" if any(each[key] != value for each in presets.values()) else ""
        defaults.append(f"  {key}={word(value)}{other}")
    meanings = [
        inspect.cleandoc(c.__doc__ or "").partition("Attributes:\n")[2].partition("\n\n")[0]
        for c in reversed(cls.__mro__)
        if dataclasses.is_dataclass(c)
    ]
    return "\n".join(["defaults:", *defaults, "", "meanings:", *meanings])


def _hints(cls: type[Settings]) -> dict[str, Any]:
    """Types of the fields that can be set."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def word(value: Any) -> str:
    """A value as ``--set`` takes it."""
    if isinstance(value, tuple | list):
        return "/".join(map(word, value))
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def _parse(hint: Any, text: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        parts = [part for part in text.replace("/", ",").split(",") if part]
        if args[-1] is not Ellipsis and len(parts) != len(args):
            raise ValueError(text)
        return tuple(_parse(args[0], part) for part in parts)
    if origin is Literal:
        if text not in args:
            raise ValueError(text)
        return text
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    return hint(text)


def _describe(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and args[-1] is not Ellipsis:
        return f"{len(args)} values, each {_describe(args[0])}, separated by slashes"
    if origin is tuple:
        return f"one value or several separated by slashes, each {_describe(args[0])}"
    if origin is Literal:
        return " or ".join(args)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
    return names[hint]
