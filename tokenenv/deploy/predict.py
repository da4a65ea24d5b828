"""Class names and probabilities of image files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from tokenenv.data.pixels import Preprocess, one_line
from tokenenv.errors import UserError
from tokenenv.game.checks import MOST_IMAGES, check_whole
from tokenenv.paths import as_path


@dataclass(frozen=True)
class Prediction:
    """What a model sees in an image.

    Attributes:
        file: the image's file, as it was given.
        names: the most probable classes, the first first.
        probabilities: theirs, of all classes together 1.
        indices: their outputs of the head.
    """

    file: str
    names: tuple[str, ...]
    probabilities: tuple[float, ...]
    indices: tuple[int, ...]

    @property
    def name(self) -> str:
        """The most probable class."""
        return self.names[0]

    @property
    def probability(self) -> float:
        """Its probability."""
        return self.probabilities[0]


def predict_files(
    run: Callable[[Tensor], Tensor],
    preprocess: Preprocess,
    names: Sequence[str] | None,
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    top: int,
    batch: int,
) -> list[Prediction]:
    """Predict the classes of images.

    Args:
        run: images ``(B, C, H, W)``, normalised -> logits ``(B, classes)``, on any device.
        preprocess: of the model.
        names: of its outputs; None: their numbers.
        paths: one image file or several.
        top: how many classes to name of each image.
        batch: images per pass.

    Raises:
        UserError: ``top`` or ``batch`` is no positive number, or a file is no image.
    """
    check_whole("batch", batch, 1, MOST_IMAGES + 1)
    check_whole("top", top, 1)
    files = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    found: list[Prediction] = []
    for start in range(0, len(files), batch):
        some = files[start : start + batch]
        pixels = [_pixels(as_path(file, "paths"), preprocess) for file in some]
        with torch.inference_mode():
            chances = run(preprocess.normalise(pixels)).float().softmax(1).cpu()
        best = chances.topk(min(top, chances.shape[1]), dim=1)
        for file, values, indices in zip(
            some, best.values.tolist(), best.indices.tolist(), strict=True
        ):
            called = tuple(str(i) if names is None else names[i] for i in indices)
            found.append(Prediction(os.fspath(file), called, tuple(values), tuple(indices)))
    return found


def _pixels(path: Path, preprocess: Preprocess) -> Tensor:
    try:
        with Image.open(path) as image:
            return preprocess.pixels(image)
    except Exception as error:  # Pillow raises many types of exception for bad files
        raise UserError(
            f"'{path}' is no image that can be read ({one_line(error)}): leave it out"
        ) from None
