"""What an artefact says of itself: preprocessing, class names, method, what was measured where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from tokenenv._version import __version__
from tokenenv.data import Preprocessing
from tokenenv.data.labels import name_outputs, output_names
from tokenenv.errors import UserError

KINDS: dict[str, Any] = {
    "preprocessing": dict | None,
    "classes": list[str] | None,
    "method": str | None,
    "measured": dict | None,
    "tokenenv": str | None,
}
"""The fields and their kinds, as ``check_fields`` takes them; older artefacts have fewer."""


def describe_model(model: nn.Module, method: str, measured: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a timm model that a method was added to.

    Args:
        model: the model; it tells preprocessing and class names.
        method: the method, as a user names it.
        measured: accuracy, multiply-adds and speed, with data and machine, as JSON.
    """
    return {
        "preprocessing": Preprocessing.of(model).to_json(),
        "classes": output_names(model),
        "method": method,
        "measured": dict(measured),
        "tokenenv": __version__,
    }


def apply_description(said: Mapping[str, Any], model: nn.Module, path: object) -> None:
    """Give a model the preprocessing and the class names that an artefact in ``path`` says.

    Raises:
        UserError: they don't fit the model.
    """
    if (values := said.get("preprocessing")) is not None:
        Preprocessing.from_json(values, path).apply(model)
    names = said.get("classes")
    if names is not None and names != output_names(model):
        try:
            name_outputs(model, names)
        except UserError as error:
            raise UserError(f"'classes' in '{path}': {error}") from None
