"""A page to explore: methods on the same images, with pictures of some of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokenenv.api.compare import Work, each_setting
from tokenenv.api.opening import Opened, open_candidates
from tokenenv.data import ImageSource, Preprocessing, open_source
from tokenenv.errors import UserError, check_keywords
from tokenenv.game.checks import MOST_IMAGES, check_whole
from tokenenv.measure.candidate import MethodCandidate
from tokenenv.measure.comparison import Comparison
from tokenenv.measure.opening import named_model, text
from tokenenv.measure.printing import report_skipped
from tokenenv.measure.state import Memory
from tokenenv.measure.watching import Seen, see
from tokenenv.page.data import page_of_exploration
from tokenenv.page.html import write_page
from tokenenv.paths import as_path

INDEX = "index.html"
"""Name of the page in its folder."""

MOST_SHOWN = 400
"""Largest number of images in a page."""

_LARGE = 8 * 2**20  # bytes from which a page is called large


@dataclass(frozen=True, repr=False)
class Exploration:
    """Methods on the same images, and their episodes on some of these.

    Attributes:
        comparison: accuracy and cost on all images.
        source: the images.
        shown: positions in the source of the images with recorded episodes.
        seen: those episodes.
        note: in words, which images they are and which methods have no pictures.
    """

    comparison: Comparison
    source: ImageSource
    shown: list[int]
    seen: Seen
    note: str

    def save(self, out: str | os.PathLike[str]) -> int:
        """Write the page ``index.html`` into a folder, atomically; returns its size in bytes.

        Raises:
            UserError: the file can't be written.
        """
        labels = self.source.labels[self.shown].tolist()
        files = [self.source.files[i] for i in self.shown]
        page = page_of_exploration(self.comparison, self.seen, labels, files, self.note)
        return write_page(as_path(out, "out") / INDEX, page)

    def __repr__(self) -> str:
        whats = ", ".join(row.what for row in self.comparison.rows[1:])
        return f"<Exploration of {whats} on {self.comparison.model}: {len(self.shown)} images>"


@check_keywords
def explore(
    what: Sequence[Any],
    *,
    model: str | None = None,
    weights: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    images: int = 60,
    limit: int = 600,
    batch: Sequence[int] = (1,),
    rounds: int = 3,
    device: str = "cpu",
    preprocessing: Preprocessing | None = None,
    trust: bool = False,
) -> Exploration:
    """Compare methods and record what they do to some images; as ``tokenenv explore``.

    Args:
        what: methods, each as :func:`tokenenv.evaluate` takes it; in a word ``key=1|2|3`` is a
            sweep.
        model: see :func:`tokenenv.evaluate`.
        weights: see :func:`tokenenv.evaluate`.
        data: see :func:`tokenenv.evaluate`.
        images: how many images the page shows; a random sample, balanced over the classes.
        limit: how many images accuracy is measured on; a random sample likewise if there are more.
        batch: batch sizes to time; empty: nothing is timed.
        rounds: number of timings of each method.
        device: see :func:`tokenenv.evaluate`.
        preprocessing: see :func:`tokenenv.evaluate`.
        trust: see :func:`tokenenv.evaluate`.

    Raises:
        UserError: an argument is wrong, or none of the methods takes decisions about tokens.
    """
    check_whole("images", images, 1, MOST_SHOWN + 1)
    check_whole("limit", limit, 1)
    batches = [check_whole("batch", size, 1, MOST_IMAGES + 1) for size in dict.fromkeys(batch)]
    opened = open_candidates(
        each_setting([what] if isinstance(what, str) else what),
        named_model(model, weights, device, "float32", preprocessing),
        data=text(data, "data"),
        trust=trust,
    )
    pictured = _pictured(opened)
    whole = open_source(text(data, "data"), opened.dense.model, split="test")
    source = whole.subset(limit, seed=0)
    if len(source) < len(whole):
        print(
            f"sampled {len(source):,} of {len(whole):,} images of {whole.name}, balanced over the "
            "classes: a higher limit takes more"
        )
    work = Work(opened, source, Memory(), rounds, batches, published=True)
    work.evaluate()
    report_skipped(source)
    work.time()
    comparison = work.comparison()
    readable = next(iter(work.done.values())).index
    shown = _sample(source, readable, images)
    batch_shown = source.batch(shown)
    on = {each.what: each.backbone for each in pictured}
    seen = see(on, opened.dense, {e.what: e.method for e in pictured}, source, batch_shown)
    note = _note(len(shown), comparison.dense.images, opened, pictured)
    return Exploration(comparison, source, batch_shown.index.tolist(), seen, note)


def report_size(size: int, out: Path, shown: int) -> None:
    """Print where a page is and how large; and what to do if it is large to send."""
    print(f"the page is {out / INDEX} ({size / 2**20:.1f} MB): open it in a browser")
    if size > _LARGE:
        print(f"it is large for a page: fewer images than {shown}, or fewer methods, make it small")


def _pictured(opened: Opened) -> list[MethodCandidate]:
    """The candidates whose decisions can be shown."""
    found = [
        each
        for each in opened.candidates
        if isinstance(each, MethodCandidate) and each.method.reduction.blocks
    ]
    if not found:
        raise UserError(
            f"'{opened.candidates[0].what}' takes no decisions about tokens, so there is nothing "
            "to explore: add a method with blocks, such as tome:r=8"
        )
    return found


def _sample(source: ImageSource, readable: torch.Tensor, count: int) -> torch.Tensor:
    """Positions of ``count`` readable images, balanced over the classes and in order."""
    part = source.subset(count + len(source) - len(readable), seed=1)
    places = {file: i for i, file in enumerate(source.files)}
    chosen = torch.tensor([places[file] for file in part.files])
    return chosen[torch.isin(chosen, readable)][:count]


def _note(shown: int, images: int, opened: Opened, pictured: Sequence[MethodCandidate]) -> str:
    words = f"{shown} of {images} images" if shown < images else f"All {images} images"
    words += ", a random sample balanced over the classes." if shown < images else "."
    names = {each.what for each in pictured}
    missing = [each.what for each in opened.candidates if each.what not in names]
    if missing:
        words += (
            f" Not pictured, as they take no decisions about single tokens: {', '.join(missing)}."
        )
    return words
