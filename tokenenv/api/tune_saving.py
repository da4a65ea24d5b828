"""Writing the recommended model beside the files of its search."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from tokenenv.api.compress import as_loaded, counted
from tokenenv.api.tune_inputs import MODEL
from tokenenv.data import ImageSource
from tokenenv.deploy.compressed import CONFIG, POLICY, WEIGHTS
from tokenenv.deploy.compressed import compress as compress_model
from tokenenv.errors import UserError
from tokenenv.measure.candidate import MethodCandidate


def save_model(
    candidate: MethodCandidate, folder: Path, source: ImageSource, measured: dict[str, Any]
) -> None:
    """Write a candidate as a compressed model into a folder that holds other files already.

    It says its method and what was ``measured``. It is loaded again before its files take their
    names, and has to give the same logits.

    Raises:
        UserError: it can't be written, or the logits differ.
    """
    fast, place = compress_model(candidate.backbone.model, candidate.method), folder / ".model"
    images = source.batch(torch.arange(min(len(source), 64))).images
    images = images.to(candidate.backbone.device, candidate.backbone.dtype)
    fast.method, fast.measured = candidate.what, counted(fast, images) | measured
    shutil.rmtree(place, ignore_errors=True)  # of a process that was killed
    try:
        fast.save(place)
        if not as_loaded(fast, place, images):
            raise UserError(
                f"'{candidate.what}' gives other logits after loading than before: it is not "
                "written; compress it by your own code"
            )
        (folder / MODEL).unlink(missing_ok=True)  # of another method; written anew if need be
        names = sorted((p.name for p in place.iterdir()), key=lambda name: name == CONFIG)
        for name in names:  # the file that makes it a compressed model comes last
            os.replace(place / name, folder / name)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def forget_model(folder: Path) -> None:
    """Remove the model of an earlier search in the same folder, which is recommended no more."""
    for name in (CONFIG, WEIGHTS, POLICY, MODEL):
        (folder / name).unlink(missing_ok=True)
