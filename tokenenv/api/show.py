"""Show what methods do to images of any kind, block by block."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokenenv.api.opening import Opened, each_once, open_candidates
from tokenenv.data import ImageSource, Preprocessing
from tokenenv.data.files import open_files
from tokenenv.errors import UserError, check_keywords
from tokenenv.game.animation import save_gif
from tokenenv.measure.candidate import Candidate, MethodCandidate
from tokenenv.measure.opening import named_model
from tokenenv.measure.sheets import left_in_words, sheet_png
from tokenenv.measure.speed import DENSE, Speed, bench
from tokenenv.measure.watching import Seen, check_watchable, frames, guesses, see
from tokenenv.page.data import page_of_images
from tokenenv.page.html import write_page
from tokenenv.paths import as_path, path_text
from tokenenv.storage import write_bytes

SUFFIXES = (".png", ".gif", ".html")
"""Of the files that :meth:`Shown.save` writes."""

MOST_FILES = 50
"""Largest number of images, which all appear in one picture."""

_ROUNDS = 3


@dataclass(frozen=True, repr=False)
class Shown:
    """What methods do to some images.

    Attributes:
        model: timm's name of the dense model.
        files: the images.
        labels: their true classes, -1 where unknown.
        seen: the recorded episodes.
        speeds: measured times of the dense model and of each method, one image at a time.
    """

    model: str
    files: list[str]
    labels: list[int]
    seen: Seen
    speeds: list[Speed]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a picture, an animation or a page, atomically.

        Args:
            path: ``.png``: a panel for each block in which a method decides. ``.gif``: a frame for
                each. ``.html``: a page with a slider over the blocks.

        Raises:
            UserError: another suffix, or the file can't be written.
        """
        place = check_suffix(as_path(path, "path"))
        if place.suffix.lower() == ".png":
            write_bytes(place, sheet_png(self.seen, self.speeds))
        elif place.suffix.lower() == ".gif":
            save_gif(place, frames(self.seen))
        else:
            write_page(
                place, page_of_images(self.model, self.seen, self.labels, self.files, self.speeds)
            )

    def lines(self) -> list[str]:
        """What each method leaves of each image, and the classes seen before and after."""
        seen, times = self.seen, {speed.what: speed for speed in self.speeds}
        found = []
        for i, file in enumerate(self.files):
            for what, method in seen.methods.items():
                last = method.steps[-1]
                before, after = (
                    f"{name} ({100 * probability:.1f} %)"
                    for p in (seen.dense[i], last.probabilities[i])
                    for name, probability in guesses(p, seen.names, 1)
                )
                words = left_in_words(method, last, i, times.get(what), times.get(DENSE))
                found += [f"{file}, {what}: dense {before}, reduced {after}", f"  {words}"]
        return found

    def _repr_png_(self) -> bytes:
        return sheet_png(self.seen, self.speeds)

    def __repr__(self) -> str:
        whats = ", ".join(self.seen.methods)
        return f"<Shown {whats} on {self.model}: {len(self.files)} images>"


def check_suffix(path: Path) -> Path:
    """``path`` as it is.

    Raises:
        UserError: its suffix is none of :data:`SUFFIXES`.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"'{path}' ends with none of {', '.join(SUFFIXES)}: give a name such as shown.png"
        )
    return path


@check_keywords
def show(
    what: Any,
    images: Sequence[str | os.PathLike[str]],
    *,
    against: Any = None,
    model: str | None = None,
    weights: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    preprocessing: Preprocessing | None = None,
    trust: bool = False,
) -> Shown:
    """Show block by block which tokens leave or merge; as ``tokenenv show``.

    An image need not have a label. If the name of its folder is a class of the model (a WordNet id,
    or one of the model's labels), that is taken for its true class.

    Args:
        what: a method as for :func:`tokenenv.evaluate`.
        images: image files of any size and colour mode.
        against: a second method to show beside it; None: no other.
        model: timm's name of the model; None: the one ``what`` was trained on, else ``digits_vit``.
        weights: a ``.safetensors`` or ``.pth`` state dict, or ``"random"``; None: the embedded
            weights or timm's.
        device: ``"cpu"``, ``"cuda"`` ...
        preprocessing: replaces that of the run or the model that ``what`` names, or timm's.
        trust: whether to run third-party code that a saved method names.

    Raises:
        UserError: an argument is wrong, an image can't be read, or a method takes no decisions
            about tokens.
    """
    if isinstance(images, str | os.PathLike):
        images = [images]
    files = [path_text(image, "images") for image in images]
    if not 1 <= len(files) <= MOST_FILES:
        raise UserError(
            f"images names {len(files)} files: give 1 to {MOST_FILES}; tokenenv.explore shows some "
            "of a folder"
        )
    opened = open_candidates(
        each_once([what] if against is None else [what, against]),
        named_model(model, weights, device, "float32", preprocessing),
        images=False,
        trust=trust,
    )
    source = open_files(files, opened.dense.model)
    seen = see_all(opened, source, torch.arange(len(source)))
    batch = source.batch(torch.arange(len(source))).images
    speeds = bench(
        opened.dense, opened.candidates, batch.to(opened.dense.device), batch=1, rounds=_ROUNDS
    )
    return Shown(opened.model.name, source.files, source.labels.tolist(), seen, speeds)


def see_all(opened: Opened, source: ImageSource, index: torch.Tensor) -> Seen:
    """Play all candidates on images of a source.

    Raises:
        UserError: one takes no decisions about tokens, or no image can be read.
    """
    chosen = [_decides(candidate) for candidate in opened.candidates]
    batch = source.batch(index)
    if not len(batch.index):
        raise UserError(f"none of the images of '{source.name}' could be read: check the files")
    on = {each.what: each.backbone for each in chosen}
    methods = {each.what: each.method for each in chosen}
    return see(on, opened.dense, methods, source, batch)


def _decides(candidate: Candidate) -> MethodCandidate:
    if not isinstance(candidate, MethodCandidate):
        raise UserError(
            f"'{candidate.what}' merges tokens inside its blocks and takes no decisions to watch: "
            "take a policy or a method such as tome:r=8"
        )
    check_watchable(candidate.what, candidate.method)
    return candidate
