"""Models with LTM blocks among what commands are given: run folders, and what save_ltm wrote."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agents.policies.words import split_name
from tokenenv.cli.common import precision
from tokenenv.errors import UserError
from tokenenv.ltm.model import LTM
from tokenenv.ltm.storage import CONFIG, load_ltm


def is_merged(what: str) -> bool:
    """Whether ``what`` is a folder with such a model.

    Raises:
        UserError: it is, with arguments behind it.
    """
    folder, more = split_name(what)
    if not Path(folder, CONFIG).is_file():
        return False
    if more:
        raise UserError(
            f"'{folder}' has LTM blocks, nothing of which can be set here: leave ':{more}' out"
        )
    return True


def open_merged(args: argparse.Namespace, whats: Sequence[str]) -> dict[str, LTM]:
    """Load those of ``whats`` that are such models, on ``--device``, in ``--dtype``.

    ``--model`` and ``--weights``, where they are not given, become the timm model that the first
    of them was made of, and the weights that its training started from.

    Raises:
        UserError: unreadable, or made of different timm models.
    """
    found: dict[str, LTM] = {}
    for what in filter(is_merged, whats):
        started = started_from(what)
        if args.model not in (None, started["model"]):
            raise UserError(
                f"'{what}' is a {started['model']} with LTM blocks, not a {args.model}: "
                "compare it with its own model"
            )
        if args.model is None:
            args.model, args.weights = started["model"], args.weights or started["weights"]
        found[what] = load_ltm(what, args.device).to(precision(args))
    return found


def started_from(what: str) -> dict[str, Any]:
    """The timm ``model`` that LTM blocks were put into, and its ``weights``: None for timm's.

    Raises:
        UserError: the folder doesn't say.
    """
    run, own = Path(what, "config.json"), Path(what, CONFIG)
    try:
        if run.is_file():
            known = json.loads(run.read_text())
            return {"model": known["model"], "weights": known["weights"]}
        return {"model": json.loads(own.read_text())["model"], "weights": None}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"'{what}' doesn't say which model it was made of ({type(error).__name__}): restore it"
        ) from None
