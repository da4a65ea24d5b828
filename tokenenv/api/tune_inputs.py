"""What a search for the fastest model is given: its arguments, its images, its folder."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenenv.data import ImageSource, open_source
from tokenenv.data.opening import SCENES, open_unlabelled
from tokenenv.deploy.compressed import CONFIG
from tokenenv.errors import UserError
from tokenenv.measure.opening import Model
from tokenenv.measure.printing import report_skipped
from tokenenv.tuning.state import STATE
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.load import SCENES_MODELS

MODEL = "model.onnx"
"""The recommended model's file if it runs in ONNX Runtime."""

VERIFYING = 0.6
"""Share of the images that verify; the others choose."""

TABLES = ("tune.md", "tune.json", "tune.png")
"""Files that a search writes."""

_OTHERS = (
    MODEL,
    "config.json",
    "checkpoint.safetensors",
    "policy.safetensors",
    "model.safetensors",
)


@dataclass(frozen=True)
class Asked:
    """The arguments of :func:`tune`, checked."""

    model: Model
    data: str | None
    budget: float
    batch: int
    methods: tuple[Any, ...]
    only_methods: bool
    train: float
    unlabelled: bool
    compile: bool
    limit: int | None
    seed: int
    folder: Path | None
    dtype: str | None
    trust: bool
    runtime: str
    export: Path | None


def check_budget(budget: float) -> float:
    """``budget``, unchanged.

    Raises:
        UserError: it is no number above 0 and below 100.
    """
    if not (isinstance(budget, int | float) and 0 < budget < 100):
        raise UserError(
            f"budget={budget} must be a number of percentage points above 0 and below 100: such as "
            "0.5"
        )
    return float(budget)


def seconds_of(duration: str) -> float:
    """Seconds of a duration such as ``90s``, ``15m`` or ``1.5h``.

    Raises:
        UserError: it has another form.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", duration)
    if match is None or float(match[1]) == 0:
        raise UserError(f"'{duration}' is no duration above 0: give 90s, 15m or 1h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def check_folder(folder: Path) -> None:
    """See that nothing of somebody else's lies where a search writes.

    Raises:
        UserError: there is a run, a compressed model or a table, and no search.
    """
    if (folder / STATE).exists():
        return
    there = [name for name in (*TABLES, CONFIG, *_OTHERS) if (folder / name).exists()]
    if there:
        raise UserError(
            f"'{folder}' holds '{there[0]}', which is of no search: give a new folder as --out"
        )


def check_dense(top1: float, source: ImageSource) -> None:
    """See that the model knows the classes of the images.

    Raises:
        UserError: its top-1 is about what guessing gives.
    """
    guessed = 100.0 / len(source.labels.unique())
    if top1 <= 1.2 * guessed:
        raise UserError(
            f"the dense model has {top1:.2f} % top-1 on '{source.name}', about what guessing "
            "gives: check that its labels are the model's classes, or give --unlabelled"
        )


def open_images(asked: Asked, model: Model, dense: Backbone) -> ImageSource:
    """The images to choose and to verify on, those that can be read.

    Raises:
        UserError: there are too few, or of one class only.
    """
    if asked.unlabelled and asked.data is not None and os.path.isdir(asked.data):
        source = open_unlabelled(asked.data, dense.model)
    else:
        scenes = asked.data == SCENES or (asked.data is None and model.name in SCENES_MODELS)
        split = "validation" if scenes else "test"
        source = open_source(asked.data, dense.model, split=split)  # type: ignore[arg-type]
    if asked.limit is not None:
        source = source.subset(asked.limit, asked.seed)
    given, source = source, source.only_readable()
    report_skipped(given)
    if not asked.unlabelled and len(source.labels.unique()) == 1:
        raise UserError(
            f"all {len(source)} images of '{source.name}' are of one class, on which top-1 says "
            "little: give images of the classes that the model will meet, or --unlabelled"
        )
    verifying, needed = round(VERIFYING * len(source)), math.ceil(100 / asked.budget)
    if verifying < needed:
        raise UserError(
            f"{len(source)} images of '{source.name}' are too few for a budget of "
            f"{asked.budget:g} points: {verifying} of them verify, and one is "
            f"{100 / max(verifying, 1):.2f} points; give at least "
            f"{math.ceil(needed / VERIFYING)} images or a larger budget"
        )
    return source
