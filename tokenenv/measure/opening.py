"""A model as a user names it, and the frozen model that this opens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from tokenenv.errors import UserError
from tokenenv.ltm.model import check_family
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.dense import Dense
from tokenenv.vit.families import family_of
from tokenenv.vit.load import (
    DIGITS_MODELS,
    EMBEDDED,
    check_device,
    check_dtype,
    check_name,
    load_backbone,
    load_model,
)


@dataclass(frozen=True)
class Model:
    """What the options ``--model``, ``--weights``, ``--device`` and ``--dtype`` name.

    Attributes:
        name: of a timm model, or of an embedded one.
        weights: a file, ``random``, or None for the embedded or timm's own.
        device: where it computes.
        dtype: what it computes in.
        named: whether the user named it; else it is a default.
    """

    name: str = EMBEDDED
    weights: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    named: bool = True

    def depth(self) -> int | None:
        """Number of blocks of the backbone, without its weights; None where timm can't tell.

        Raises:
            UserError: unknown or unsupported model.
        """
        found: list[int] = []
        check_name(self.name, lambda model: found.append(len(family_of(model).blocks)))
        return found[0] if found else None

    def open_backbone(self, data: str | None = None, *, images: bool = True) -> Backbone:
        """The frozen backbone.

        Args:
            data: images that are given, of which only the embedded models have their own.
            images: whether images are needed.

        Raises:
            UserError: unknown, unsupported or unreadable, or a model without images of its own and
                no ``data``.
        """
        check_name(self.name)
        self._check_data(data, images)
        with self._blamed():
            return load_backbone(self.name, self.weights, self.device, check_dtype(self.dtype))

    def open_dense(self, data: str | None = None, *, images: bool = True) -> Dense:
        """:meth:`open_backbone` for a model of any family that LTM has blocks for."""
        check_name(self.name, check_family)
        self._check_data(data, images)
        place = check_device(self.device)
        with self._blamed():
            model = load_model(self.name, self.weights, check=check_family)
        return Dense(model).to(place, check_dtype(self.dtype))

    def _check_data(self, data: str | None, images: bool) -> None:
        if self.name in DIGITS_MODELS:
            return
        if images and data is None:
            raise UserError(f"model '{self.name}' needs --data: a folder of class/image")
        if self.weights is None:
            print(f"loading '{self.name}' with timm's weights for it; --weights FILE takes others")

    @contextlib.contextmanager
    def _blamed(self) -> Iterator[None]:
        """Where weights don't fit a model that is a default, say so."""
        try:
            yield
        except UserError as error:
            if self.named or self.weights is None or "don't fit" not in str(error):
                raise
            raise UserError(
                f"{error} (no --model was given, so they were read for '{self.name}')"
            ) from None
