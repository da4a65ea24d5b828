"""How long a training will take, from two of its updates."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agents.training.request import make_request
from agents.workers import ALONE


@dataclass(frozen=True)
class Pilot:
    """What a training consists of.

    Attributes:
        seconds: of an update, measured.
        updates: how many there will be.
        images: passes of single images beside the updates: judgements on held-back images, and the
            report.
        held_back: number of held-back images.
    """

    seconds: float
    updates: int
    images: int
    held_back: int

    def took(self, images_per_s: float) -> float:
        """Seconds of the whole training, at so many evaluated images per second."""
        return self.updates * self.seconds + self.images / images_per_s


def pilot(system: str, **arguments: Any) -> Pilot:
    """Do two updates of a training and forget them; the second is timed.

    Arguments are those of :func:`agents.training.train`.

    Raises:
        UserError: an argument is wrong.
    """
    request = make_request(system, **arguments)
    config: Any = request.config
    with tempfile.TemporaryDirectory() as place:
        training: Any = config.training(request, ALONE, Path(place))
        learner = training.trainer.learner
        learner.update()
        start = time.perf_counter()
        learner.update()
        seconds = time.perf_counter() - start
    held_back = training.judge.source
    final = request.final_images(training.judge.backbone, held_back)
    judged = config.updates // config.evaluate_every + 2 + 2 * getattr(config, "calibrate", 0)
    images = judged * len(held_back) + 3 * len(final)
    return Pilot(seconds, config.updates, images, len(held_back))
