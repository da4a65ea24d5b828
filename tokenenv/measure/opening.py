"""A model as a user names it, and how it is opened with frozen weights."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenenv.artefact import FAULTS, check_annotated, reason_of
from tokenenv.data import Preprocessing, open_source
from tokenenv.data.labels import TIMMS_ORDER
from tokenenv.data.pixels import Preprocess
from tokenenv.errors import UserError
from tokenenv.ltm.model import check_family
from tokenenv.paths import path_text
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.checkpoint import training_arguments
from tokenenv.vit.dense import Dense
from tokenenv.vit.families import family_of
from tokenenv.vit.load import (
    EMBEDDED,
    EMBEDDED_MODELS,
    RANDOM,
    check_device,
    check_dtype,
    check_name,
    load_backbone,
    load_model,
)


@dataclass(frozen=True)
class Model:
    """A model by the options ``--model``, ``--weights``, ``--device`` and ``--dtype``.

    Attributes:
        name: timm's name of the model, or that of an embedded one.
        weights: a file, ``random``, or None for the embedded weights or timm's.
        device: such as ``cpu`` or ``cuda``.
        dtype: precision of the computation, such as ``float32``.
        named: False if the user named no model and ``name`` is a default.
        preprocessing: replaces timm's.
        timms_order: whether timm's training script numbered its classes.
    """

    name: str = EMBEDDED
    weights: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    named: bool = True
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    timms_order: bool = False

    def outline(self) -> Backbone | None:
        """The backbone without weights, on the meta device; None if timm can't make one.

        Raises:
            UserError: the model is unknown or not supported, or can't have the preprocessing.
        """
        found: list[Backbone] = []

        def make(model: nn.Module) -> None:
            family_of(model)
            self.prepare(model)
            found.append(Backbone(model))

        check_name(self.name, make)
        return found[0] if found else None

    @property
    def from_file(self) -> bool:
        """Whether a file of weights may tell another image size or number of classes."""
        return self.weights not in (None, RANDOM)

    def open_backbone(self, data: str | None = None, *, images: bool = True) -> Backbone:
        """The frozen backbone.

        Args:
            data: the images that the user named; only the embedded models have images of their own.
            images: whether images are needed.

        Raises:
            UserError: the model is unknown, not supported or unreadable, or it needs ``data``.
        """
        check_name(self.name)
        self._check_data(data, images)
        with self._hint_at_default():
            return load_backbone(
                self.name, self.weights, self.device, check_dtype(self.dtype), self.prepare
            )

    def open_dense(self, data: str | None = None, *, images: bool = True) -> Dense:
        """:meth:`open_backbone`, but for a model of any family that has LTM blocks."""
        check_name(self.name, check_family)
        self._check_data(data, images)
        place = check_device(self.device)
        with self._hint_at_default():
            model = load_model(self.name, self.weights, check=check_family)
        self.prepare(model)
        return Dense(model).to(place, check_dtype(self.dtype))

    def prepare(self, model: nn.Module) -> None:
        """Give a loaded model the preprocessing.

        Raises:
            UserError: it can't take images of that size.
        """
        before = Preprocessing.of(model)
        if self.name in EMBEDDED_MODELS and self.preprocessing.over(before).sides != before.sides:
            raise UserError(f"the images of '{self.name}' have one size: leave --image-size out")
        self.preprocessing.apply(model)
        if self.timms_order:
            told: Any = model
            told.pretrained_cfg = {**told.pretrained_cfg, TIMMS_ORDER: True}

    def _check_data(self, data: str | None, images: bool) -> None:
        if self.name in EMBEDDED_MODELS:
            return
        if images and data is None:
            raise UserError(f"model '{self.name}' needs --data: a folder of class/image")
        if self.weights is None:
            print(f"loading '{self.name}' with timm's weights for it; --weights FILE takes others")

    @contextlib.contextmanager
    def _hint_at_default(self) -> Iterator[None]:
        """If weights don't fit a model that is only a default, add that to the error."""
        try:
            yield
        except UserError as error:
            if self.named or self.weights is None or "don't fit" not in str(error):
                raise
            raise UserError(
                f"{error} (no --model was given, so they were read for '{self.name}': give "
                "--model NAME)"
            ) from None


def named_model(
    name: str | None,
    weights: str | os.PathLike[str] | None,
    device: str,
    dtype: str,
    preprocessing: Preprocessing | None,
) -> Model:
    """The model that the arguments of a function name.

    A checkpoint of timm's training script names its model and the preprocessing itself, where the
    user doesn't.
    """
    file, given = text(weights, "weights"), preprocessing or Preprocessing()
    said: dict[str, Any] = {}
    if file not in (None, RANDOM):
        said = training_arguments(Path(str(file)))
        given = given.over(_preprocessing_of(said, str(file)))
    if name is None and isinstance(said.get("model"), str):
        name = said["model"]
        print(f"weights '{file}' are of '{name}', trained by timm's script")
    return Model(
        EMBEDDED if name is None else name,
        file,
        device,
        dtype,
        named=name is not None,
        preprocessing=given,
        timms_order=bool(said),
    )


def _preprocessing_of(said: dict[str, Any], file: str) -> Preprocessing:
    """The preprocessing in the arguments of timm's training script."""
    names = ("mean", "std", "crop_pct", "interpolation")
    values = {name: said[name] for name in names if name in said}
    size = said.get("input_size") or said.get("img_size")
    if size is not None:
        values["image_size"] = tuple(size[1:]) if isinstance(size, list | tuple) else size
    try:
        check_annotated(values, Preprocessing)
        return Preprocessing(**values)
    except FAULTS as error:
        raise UserError(
            f"preprocessing in the arguments that '{file}' holds: {reason_of(error)}; save its "
            "state_dict() alone, and give --mean, --std and so on"
        ) from None


def text(path: str | os.PathLike[str] | None, name: str) -> str | None:
    """A path as text, see :func:`~tokenenv.paths.path_text`; None stays None."""
    return None if path is None else path_text(path, name)


def images_to_time(dense: Dense, name: str, data: str | None, count: int) -> tuple[Tensor, str]:
    """Images for measuring time, and where they are from, in words.

    Args:
        dense: the model, for whose device and precision they are.
        name: of the model in timm.
        data: a folder or data set; None: those of an embedded model, random ones for others.
        count: how many at most.

    Returns:
        ``(n, C, H, W)`` normalised images, and the words.

    Raises:
        UserError: no image could be read.
    """
    if data is None and name not in EMBEDDED_MODELS:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn((count, *Preprocess(dense.model).shape), generator=generator)
        words = "random images, on which methods may decide unlike on real ones"
        return images.to(dense.device, dense.dtype), words
    source = open_source(data, dense.model, split="test", limit=count)
    images = source.batch(torch.arange(len(source))).images
    if not len(images):
        raise UserError(f"no image of '{source.name}' could be read: check the files")
    return images.to(dense.device, dense.dtype), f"{len(images)} images of {source.name}"
