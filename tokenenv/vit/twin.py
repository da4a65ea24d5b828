"""What two models differ in that their outputs for one image don't show."""

from __future__ import annotations

from typing import Any

from torch import nn

_RATES = ("p", "drop_prob")
"""Settings of dropout and stochastic depth; a module without any has the rate 0."""

_PASSING = ("training", "grad_checkpointing", "weight_init_mode", "fix_init")
"""What is set anew for each use of a model, or was used up when it was made."""


def differing_setting(one: nn.Module, other: nn.Module) -> str:
    """Name and values of a plain setting in which two models differ; empty if there is none.

    Settings are numbers, words, booleans and lists of these that the modules of the same name keep,
    such as ``patch_embed.dynamic_img_pad`` or the rate of a dropout.
    """
    others = dict(other.named_modules())
    for name, module in one.named_modules():
        twin = others.get(name)
        if twin is None:
            continue
        mine, its = _settings(module), _settings(twin)
        for rate in _RATES:
            if rate in mine or rate in its:
                mine[rate], its[rate] = mine.get(rate) or 0.0, its.get(rate) or 0.0
        for key in mine.keys() & its.keys():
            if mine[key] != its[key]:
                place = f"{name}.{key}" if name else key
                return f"{place} is {mine[key]!r:.40} and would be {its[key]!r:.40}"
    return ""


def _settings(module: nn.Module) -> dict[str, Any]:
    return {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in vars(module).items()
        if key[0] != "_" and key not in _PASSING and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
