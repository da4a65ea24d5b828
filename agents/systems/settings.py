"""Settings of a system: their base class, their checks, and the parser of their values."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import numbers
import operator
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from tokenenv.errors import UnknownArgument, UserError, did_you_mean

if TYPE_CHECKING:
    from agents.training.request import Request, Training
    from agents.workers import Workers


@dataclasses.dataclass(frozen=True)
class SystemConfig:
    """Settings of a system, and how it is trained: the base class of every system's dataclass.

    Fields have defaults, those for an ImageNet model, and are whole numbers, numbers, booleans,
    words, ``Literal`` words, or tuples of those. Values whose names other systems use too, such as
    ``batch``, are checked alike.

    Raises:
        UserError: a value out of its range.
    """

    def __post_init__(self) -> None:
        check_settings(self)

    @classmethod
    def for_digits(cls) -> SystemConfig:
        """The default settings for the embedded model of 64 tokens."""
        return cls()

    @classmethod
    def for_large_digits(cls) -> SystemConfig:
        """The default settings for the embedded model of 256 tokens."""
        return cls.for_digits()

    @classmethod
    def for_scenes(cls) -> SystemConfig:
        """The default settings for the embedded model of generated scenes, 144 tokens."""
        return cls.for_digits()

    def implied(self, given: dict[str, Any]) -> dict[str, Any]:
        """Settings that change when those in ``given`` are set, unless they are set themselves."""
        return {}

    def training(self, request: Request, workers: Workers, out: Path) -> Training:
        """Build the training run, ready to start.

        Args:
            request: the arguments of ``train``; ``request.config`` is this object.
            workers: the processes that train together.
            out: the run folder.

        Raises:
            UserError: the settings don't fit the model or the images.
        """
        raise NotImplementedError


C = TypeVar("C", bound=SystemConfig)

Check = tuple[Callable[[Any], bool], str]
"""A test of a value, and the range that it accepts, in words."""

_FROM_ONE: Check = (lambda v: v >= 1, "at least 1")
_FROM_ZERO: Check = (lambda v: v >= 0, "at least 0")
_POSITIVE: Check = (lambda v: v > 0, "greater than 0")
_PERCENT: Check = (lambda v: 0 < v < 100, "between 0 and 100")
_SHARE: Check = (lambda v: 0 <= v <= 1, "from 0 to 1")
_NOT_ALL: Check = (lambda v: 0 <= v < 1, "from 0 to below 1")
_PART: Check = (lambda v: 0 < v < 1, "between 0 and 1")
_CHECKS: dict[str, Check] = {
    **dict.fromkeys(("updates", "batch", "repeats", "evaluate_every", "cost_batch"), _FROM_ONE),
    "held_most": _FROM_ONE,
    **dict.fromkeys(("epochs", "minibatches", "critic_width", "budget_step"), _FROM_ONE),
    **dict.fromkeys(
        ("minutes", "alpha", "beta", "entropy", "calibrate", "critic_depth", "width"), _FROM_ZERO
    ),
    **dict.fromkeys(("lr", "critic_lr", "clip"), _POSITIVE),
    "penalty": (lambda v: 0 < v <= 1e6, "above 0 and at most 1e6"),
    "accumulate": _FROM_ONE,
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


RESERVED = (
    "system",
    "model",
    "weights",
    "data",
    "out",
    "images",
    "seed",
    "device",
    "dtype",
    "preprocessing",
    "resume",
    "after_update",
)
"""Arguments of :func:`agents.training.train`; no setting may have one of these names."""


def check_config(cls: Any) -> None:
    """Raise :class:`UserError` unless ``cls`` is what :class:`SystemConfig` asks for."""
    if not (isinstance(cls, type) and issubclass(cls, SystemConfig)):
        raise UserError(
            f"{getattr(cls, '__name__', cls)!r} is no class of settings: derive it from "
            "agents.systems.PolicyConfig, or from FineTuneConfig of agents.finetune.config"
        )
    try:
        hints = _hints(cls)
    except NameError as error:
        raise UserError(
            f"{cls.__name__}: a type of its settings can't be found ({error}): import it, not only "
            "for type checking"
        ) from error
    for field in dataclasses.fields(cls):
        problem = ""
        if field.name in RESERVED:
            problem = "is an argument of train() itself: rename it"
        elif field.default is dataclasses.MISSING:
            problem = "has no default: give it one"
        elif not _is_settable(hints[field.name]):
            problem = "must be a whole number, a number, a boolean, a word or a tuple of those"
        if problem:
            raise UserError(f"{cls.__name__}: setting '{field.name}' {problem}")


def preset(cls: type[C], model: str | None) -> C:
    """The default settings of a system for a model; None: the embedded model of 64 tokens."""
    from tokenenv.vit import load  # imports torch, which --help avoids

    name = load.EMBEDDED if model is None else model
    if name not in load.EMBEDDED_MODELS:
        return cls()
    if name in load.SCENES_MODELS:
        return typing.cast(C, cls.for_scenes())
    made = cls.for_digits() if name == load.EMBEDDED else cls.for_large_digits()
    return typing.cast(C, made)


def check_settings(config: Any) -> None:
    """Raise :class:`UserError` if a setting is out of its range."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for key, value in vars(config).items():
        fits, words = _CHECKS.get(key, (lambda v: True, ""))
        parts = value if isinstance(value, tuple) else (value,)
        problem = ""
        if isinstance(defaults[key], tuple) and not isinstance(value, tuple):
            problem = f"a tuple, such as {defaults[key]}"
        elif any(isinstance(part, float) and not math.isfinite(part) for part in parts):
            problem = "a finite number" if len(parts) == 1 else "finite numbers"
        else:
            # A user's own system may have a setting of the same name and another type.
            with contextlib.suppress(TypeError):
                problem = "" if fits(value) else words
        if problem:
            raise UserError(f"{key}={word(value)} doesn't do: it must be {problem}")


def with_settings(config: C, given: dict[str, Any]) -> C:
    """A copy of ``config`` with the settings ``given`` to ``train`` and those that they imply.

    Raises:
        UserError: see :func:`read_settings`, or a value out of its range.
    """
    values = read_settings(type(config), given, RESERVED)
    return dataclasses.replace(config, **{**config.implied(values), **values})


def read_settings(
    cls: type[SystemConfig], given: dict[str, Any], others: Sequence[str] = ()
) -> dict[str, Any]:
    """Check and convert values for the fields of ``cls``.

    Args:
        cls: the class of a system's settings.
        given: values by name. Strings are read in the command line's form, in which lists are
            separated by slashes or commas.
        others: names that may have been meant by one that is no field.

    Raises:
        UnknownArgument: a name is no field.
        UserError: a value has the wrong type.
    """
    hints = _hints(cls)
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in hints:
            raise UnknownArgument(
                f"{key}={word(value)}: unknown key; choose from {', '.join(sorted(hints))}"
                f"{did_you_mean(key, [*hints, *others])}"
            )
        try:
            values[key] = _read(hints[key], value)
        except (TypeError, ValueError):
            raise UserError(f"{key}={word(value)}: {key} takes {_describe(hints[key])}") from None
    return values


def settings_help(cls: type[SystemConfig]) -> str:
    """The text of ``--list-settings``: every setting with its default, then their meanings."""
    from tokenenv.vit.load import EMBEDDED_MODELS

    presets = {name: vars(preset(cls, name)) for name in EMBEDDED_MODELS}
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
    return "\n".join(["defaults:", *defaults, "", "meanings:", *filter(None, meanings)])


def _hints(cls: type[SystemConfig]) -> dict[str, Any]:
    """Types of the fields by name."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def word(value: Any) -> str:
    """A value in the form that ``--set`` takes."""
    if isinstance(value, tuple | list):
        return "/".join(map(word, value))
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def _is_settable(hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return bool(args) and all(each is Ellipsis or _is_settable(each) for each in args)
    return origin is Literal or hint in (int, float, bool, str)


def _read(hint: Any, value: Any) -> Any:
    """Convert a Python value, or a string in the command line's form, to a field's type."""
    args = typing.get_args(hint)
    if isinstance(value, str):
        return _parse(hint, value)
    if typing.get_origin(hint) is tuple:
        parts = value if isinstance(value, tuple | list) else (value,)
        if args[-1] is not Ellipsis and len(parts) != len(args):
            raise ValueError(value)
        return tuple(_read(args[0], part) for part in parts)
    if isinstance(value, bool):
        if hint is bool:
            return value
    elif hint is int:
        return operator.index(value)
    elif hint is float and isinstance(value, numbers.Real):
        return float(value)
    raise TypeError(value)


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
