"""The arguments of a training run."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from agents.systems.registry import SHOWN, SHOWN_ON, System, find_system
from agents.systems.settings import SystemConfig, preset, with_settings
from agents.training.run import Run
from tokenenv.data import ImageSource, Preprocessing, open_source
from tokenenv.data.opening import EMBEDDED_DATA
from tokenenv.errors import UserError
from tokenenv.game.checks import check_whole
from tokenenv.measure.opening import Model, named_model, text
from tokenenv.paths import as_path
from tokenenv.vit.dense import Dense
from tokenenv.vit.load import RANDOM

SEEDS = 2**32
"""Seeds are below this number."""


@dataclass(frozen=True)
class Request:
    """The arguments of :func:`agents.training.train`, checked.

    Attributes:
        system: the system to train.
        config: its settings.
        model: the model to train it on.
        data: folder or data set; None: the embedded images that belong to the model.
        out: run folder; None: a new one under ``runs``.
        images: number of images of ``data`` to use; None: all.
        seed: of everything drawn at random.
        resume: whether to continue the run in ``out``.
        after_update: see :class:`~agents.training.trainer.Trainer`.
    """

    system: System
    config: SystemConfig
    model: Model
    data: str | None = None
    out: Path | None = None
    images: int | None = None
    seed: int = 0
    resume: bool = False
    after_update: Callable[[int, Any], object] | None = None

    def training_images(self, backbone: Dense) -> ImageSource:
        """The images to train on and to hold back.

        Raises:
            UserError: there are none, or fewer than ``images``.
        """
        source = open_source(self.data, backbone.model, split="train")
        if self.images is None:
            return source
        if self.images > len(source):
            raise UserError(
                f"--images {self.images} is more than the {len(source)} images of {source.name}: "
                "ask for fewer, or leave it out to use them all"
            )
        return source.subset(self.images, self.seed)

    def divide(self, source: ImageSource) -> tuple[ImageSource, ImageSource]:
        """The images to train on, and those held back: a share, but no more than ``held_most``.

        ``source``: both together.

        Raises:
            UserError: a part would be empty.
        """
        config: Any = self.config
        share = min(config.held_back, config.held_most / len(source))
        return source.split(share, seed=self.seed)

    def final_images(self, backbone: Dense, held_back: ImageSource) -> ImageSource:
        """The images of the report: the test part of embedded images, else the held-back images."""
        if self.data in (None, *EMBEDDED_DATA):
            return open_source(self.data, backbone.model, split="test")
        return held_back

    def description(self, source: ImageSource) -> dict[str, Any]:
        """System, model, images and settings as JSON; resuming requires an equal description.

        ``source``: the images to train on and to hold back.
        """
        weights = self.model.weights
        if weights not in (None, RANDOM):
            weights = os.path.abspath(weights)
        code = {"code": self.system.origin["sha256"][:16]} if self.system.origin else {}
        return {
            "system": self.system.name,
            **code,
            "model": self.model.name,
            "weights": weights,
            "data": source.name,
            "images": len(source),
            "preprocessing": source.preprocessing.to_json(),
            "seed": self.seed,
            "dtype": self.model.dtype,
            **json.loads(json.dumps(dataclasses.asdict(self.config))),
        }


class Training(Protocol):
    """A training run, built and ready to start."""

    def run(self) -> Run:
        """Train until the last update or Ctrl-C, and write the report."""


def make_request(
    system: str | None = None,
    *,
    model: str | None = None,
    weights: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    images: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    preprocessing: Preprocessing | None = None,
    resume: bool = False,
    after_update: Callable[[int, Any], object] | None = None,
    **settings: Any,
) -> Request:
    """Check the arguments of :func:`agents.training.train`, which describes them.

    Raises:
        UserError: an argument is wrong.
    """
    found = find_system(SHOWN if system is None else system)
    if system is None and model is None and data is None:
        model = SHOWN_ON
    return Request(
        system=found,
        config=with_settings(preset(found.config, model), settings),
        model=named_model(model, weights, device, dtype, preprocessing),
        data=text(data, "data"),
        out=None if out is None else as_path(out, "out"),
        images=None if images is None else check_whole("images", images, 1),
        seed=check_whole("seed", seed, 0, SEEDS),
        resume=resume,
        after_update=after_update,
    )
