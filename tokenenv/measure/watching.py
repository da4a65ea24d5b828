"""Episodes to watch: what each decision leaves of an image, and what the model still sees in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tokenenv.data import Batch, ImageSource
from tokenenv.data.labels import class_names
from tokenenv.errors import UserError
from tokenenv.game.animation import Panel, draw_frame, guesses, save_gif
from tokenenv.game.policy import Method
from tokenenv.game.render import Pixels, to_pixels
from tokenenv.measure.episodes import Recorded, Step, record
from tokenenv.measure.token_pictures import spread
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.dense import Dense

BEFORE_AFTER = "before_after.gif"
"""Name of the animation in a run folder."""


def check_watchable(what: str, method: Method) -> None:
    """Raise :class:`UserError` if the method takes no decisions about tokens."""
    if not method.reduction.blocks:
        raise UserError(
            f"'{what}' takes no decisions about tokens, so there is nothing to watch: take a "
            "method with blocks, such as evit:keep=0.7 or tome:r=8"
        )


@dataclass(frozen=True)
class Seen:
    """Some images, and what the dense model and some methods make of them.

    Attributes:
        titles: for each image its lines in pictures: which image it is, and its class if known.
        pixels: the images ``(H, W, 3)``, as the model gets them.
        dense: ``(B, K)`` probabilities of the dense model.
        names: maps a class to its name.
        methods: the recorded episodes by what the methods are called.
    """

    titles: list[list[str]]
    pixels: list[Pixels]
    dense: NDArray[np.float32]
    names: Callable[[int], str]
    methods: dict[str, Recorded]

    @property
    def blocks(self) -> list[int | None]:
        """None, for the time before all decisions, and each block in which a method decides."""
        return [None, *sorted({b for each in self.methods.values() for b in each.blocks})]

    def panel(self, image: int, what: str, block: int | None) -> Panel:
        """The image under a method after its decisions up to ``block``."""
        method = self.methods[what]
        step = method.at(block)
        known = (
            ("dense model", guesses(self.dense[image], self.names)),
            ("with the tokens left", guesses(step.probabilities[image], self.names)),
        )
        chance = None
        if any(each.chance is not None for each in method.steps):
            nobody = np.full(step.owners.shape[1], np.nan, np.float32)
            chance = nobody if step.chance is None else step.chance[image]
        return Panel(
            (what, *self.titles[image]), self.pixels[image], step.owners[image], method.merges,
            (*feet(method, step, image), reward_line(method, step, image)), known, chance,
        )  # fmt: skip


@torch.inference_mode()
def see(
    backbone: Mapping[str, Backbone],
    dense: Dense,
    methods: Mapping[str, Method],
    source: ImageSource,
    batch: Batch,
) -> Seen:
    """Play methods on the images of a batch, beside the dense model.

    Args:
        backbone: the model that each method runs on.
        dense: the dense model.
        methods: by what they are called.
        source: where the images are from.
        batch: the images; a label below 0 is unknown.
    """
    names = class_names(dense.model)
    titles = [
        [_title(source, position), *([f"true class: {names(label)}"] if label >= 0 else [])]
        for position, label in zip(batch.index.tolist(), batch.labels.tolist(), strict=True)
    ]
    logits = dense(batch.images.to(dense.device, dense.dtype))
    played = {what: record(backbone[what], m, source, batch) for what, m in methods.items()}
    return Seen(
        titles=titles,
        pixels=[to_pixels(image, dense.model) for image in batch.images],
        dense=logits.float().softmax(1).cpu().numpy(),
        names=names,
        methods=played,
    )


def _title(source: ImageSource, position: int) -> str:
    return f"image {position}: {source.files[position]}"


def frames(seen: Seen) -> list[list[Pixels]]:
    """For each image its frames ``(H, W, 3)``, the methods beside each other.

    There is one before the first decision, and one for each block in which a method decides.
    """
    grids = [each.grid for each in seen.methods.values()]
    return [
        [
            draw_frame([seen.panel(image, what, block) for what in seen.methods], grids[0])
            for block in seen.blocks
        ]
        for image in range(len(seen.pixels))
    ]


def feet(method: Recorded, step: Step, image: int) -> tuple[str, str, str]:
    """The lines below a picture: which decision it is, tokens left, multiply-adds saved."""
    when = "before the first decision"
    if step.block is not None:
        number = method.blocks.index(step.block) + 1
        where = "in" if method.between else "before"
        when = f"decision {number} of {len(method.blocks)}, {where} block {step.block}"
    rows, columns = method.grid
    return (
        when,
        f"{step.tokens[image]} of {rows * columns} tokens left",
        f"{method.saved(step)[image] + 0.0:.1f} % of the multiply-adds saved so far",
    )


def reward_line(method: Recorded, step: Step, image: int) -> str:
    """What the image's agents got up to a step, their mean; empty without agents."""
    if not method.reward:
        return ""
    given = [each.reward for each in method.steps[: method.steps.index(step) + 1]]
    total = sum(float(np.nanmean(each[image])) for each in given if each is not None)
    return f"reward so far: {total + 0.0:.3f} ({method.reward})"


def write_before_after(
    path: Path, backbone: Backbone, before: Method, after: Method, source: ImageSource
) -> None:
    """Write the GIF of an untrained policy (left) and the trained one (right) on three images.

    No file is written if none of the images can be read.
    """
    batch = source.batch(spread(source, 3))
    if len(batch.index):
        methods = {"untrained": before, "trained": after}
        on = dict.fromkeys(methods, backbone)
        save_gif(path, frames(see(on, backbone, methods, source, batch)))
