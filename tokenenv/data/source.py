"""A source of labelled images, read on demand.

A source decodes and preprocesses images by its model's timm configuration, caches the decoded
bytes while they fit in memory, and skips unreadable images instead of failing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokenenv.data.pixels import (
    AlteredPixels,
    AugmentedPixels,
    PixelStore,
    Preprocessing,
)
from tokenenv.errors import UserError


class Batch(NamedTuple):
    """Some images of a source.

    Attributes:
        images: ``(B, C, H, W)`` float32, normalised for the model.
        labels: ``(B,)`` int64 indices into the model's head.
        index: ``(B,)`` int64 positions in the source.
    """

    images: Tensor
    labels: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which is not used


class ImageSource:
    """A list of labelled images, read on demand; :func:`open_source` makes it.

    Sources made by :meth:`subset`, :meth:`split` and :meth:`share` share the decoded images, and
    the record of unreadable ones, with the source they were made from.

    Attributes:
        name: the data set's name in reports, such as ``"digits:test"``.
        files: ``n`` names relative to the data set's root, such as ``"n01440764/7.jpg"``.
        labels: ``(n,)`` int64 indices into the model's head.
        classes: sorted unique head indices of the whole data set; a part of it has the same, so
            that accuracy restricted to these classes is comparable.
        names: the data set's names of the classes, by head index; empty if it has none.
    """

    def __init__(self, name: str, files: list[str], labels: Tensor, store: PixelStore) -> None:
        self.name = name
        self.files = files
        self.labels = labels
        self.classes = labels.unique()
        self.names: dict[int, str] = {}
        self._store = store
        self._positions = list(range(len(files)))  # in the store

    def __len__(self) -> int:
        return len(self.files)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of an image."""
        return self._store.preprocess.shape

    @property
    def preprocessing(self) -> Preprocessing:
        """How its images are resized, cropped and normalised."""
        return self._store.preprocess.used

    @property
    def skipped(self) -> list[str]:
        """Files of this source that have turned out to be unreadable so far."""
        bad = self._store.unreadable
        return [file for file, p in zip(self.files, self._positions, strict=True) if p in bad]

    @property
    def unreadable(self) -> dict[int, str]:
        """Reasons why images could not be read so far, by position in the whole data set."""
        return self._store.unreadable

    def batch(self, index: Tensor) -> Batch:
        """Read the images at positions ``index (B,)``, in that order.

        Unreadable images are left out, so ``Batch.index`` may be shorter than ``index``, even
        empty.
        """
        index = index.to("cpu", torch.int64)
        pixels = self._store.read([self._positions[i] for i in index.tolist()])
        kept = index[torch.tensor([image is not None for image in pixels], dtype=torch.bool)]
        images = self._store.preprocess.normalise([image for image in pixels if image is not None])
        return Batch(images, self.labels[kept], kept)

    def expect(self, index: Tensor) -> None:
        """Start to decode images at positions ``index (B,)``, which will be read soon."""
        self._store.expect([self._positions[i] for i in index.tolist()])

    def readable(self, index: Tensor) -> Tensor:
        """``(B,)`` bool, False for images at ``index (B,)`` that are known to be unreadable."""
        bad = self._store.unreadable
        known = [self._positions[i] not in bad for i in index.tolist()]
        return torch.tensor(known, dtype=torch.bool)

    def check_readable(self) -> None:
        """Check that some image of this source may be readable.

        Raises:
            UserError: all have turned out to be unreadable.
        """
        if len(self._store.unreadable) < len(self):  # cheap, as this runs before every batch
            return
        if len(self.skipped) == len(self):
            reason = self._store.unreadable[self._positions[0]]
            raise UserError(
                f"none of the {len(self)} images of '{self.name}' is readable, for example "
                f"'{self.files[0]}' ({reason}); replace the files"
            )

    def only_readable(self) -> ImageSource:
        """The images that can be read, each of which is read once to see that.

        Raises:
            UserError: none is readable.
        """
        everything = torch.arange(len(self))
        for index in everything.split(64):
            self.check_readable()
            self.batch(index)
        self.check_readable()
        return self._part(everything[self.readable(everything)])

    def subset(self, n: int, seed: int) -> ImageSource:
        """A random subset of ``n`` images, balanced over the classes as far as possible.

        All images if there are no more than ``n``.

        Raises:
            UserError: ``n`` is less than one.
        """
        if n < 1:
            raise UserError(f"cannot take {n} images of '{self.name}'; ask for at least 1")
        return self._part(_draw(self.labels, min(n, len(self)), seed, proportional=False))

    def split(self, fraction: float, seed: int) -> tuple[ImageSource, ImageSource]:
        """Two disjoint random parts, with ``1 - fraction`` and ``fraction`` of the images.

        Both have the same share of every class as far as possible.

        Raises:
            UserError: a part would be empty.
        """
        count = round(fraction * len(self))
        if not 0 < count < len(self):
            raise UserError(
                f"a fraction of {fraction} of the {len(self)} images of '{self.name}' leaves a "
                "part empty; choose one between 0 and 1, or more images"
            )
        held = torch.zeros(len(self), dtype=torch.bool)
        held[_draw(self.labels, count, seed, proportional=True)] = True
        return self._part(torch.where(~held)[0]), self._part(torch.where(held)[0])

    def altered(self, name: str, alter: Callable[[Tensor, int], Tensor]) -> ImageSource:
        """The same images, each passed through ``alter`` before it is normalised.

        Args:
            name: name of the new source.
            alter: maps ``(C, H, W)`` uint8 pixels, resized and cropped, and the image's position
                in the whole data set (which :meth:`subset` and :meth:`split` don't change) to
                pixels of the same shape and type. It must be deterministic.
        """
        return self._seen_as(name, AlteredPixels(self._store, alter))

    def augmented(self, augment: Callable[[Tensor], Tensor]) -> ImageSource:
        """The same images, with a random ``augment`` applied at each reading.

        ``augment`` maps ``(C, H, W)`` uint8 pixels, resized and cropped, to pixels of the same
        shape and type.
        """
        return self._seen_as(self.name, AugmentedPixels(self._store, augment))

    def share(self, rank: int, of: int, *, even: bool = True) -> ImageSource:
        """Every ``of``-th image, starting at ``rank``: one of ``of`` disjoint shares.

        Args:
            rank: which share, from 0.
            of: number of shares.
            even: whether all shares have the same length; left-over images are then in none.

        Raises:
            UserError: there are fewer images than shares.
        """
        each = len(self) // of
        if not each:
            raise UserError(
                f"{of} processes share the {len(self)} images of '{self.name}': start fewer"
            )
        end = each * of if even else len(self)
        return self if of == 1 else self._part(torch.arange(rank, end, of))

    def _seen_as(self, name: str, store: PixelStore) -> ImageSource:
        other = ImageSource(name, self.files, self.labels, store)
        other.classes, other.names = self.classes, self.names
        other._positions = self._positions
        return other

    def _part(self, index: Tensor) -> ImageSource:
        chosen = index.tolist()
        files = [self.files[i] for i in chosen]
        part = ImageSource(self.name, files, self.labels[index], self._store)
        part.classes, part.names = self.classes, self.names
        part._positions = [self._positions[i] for i in chosen]
        return part


def _draw(labels: Tensor, count: int, seed: int, *, proportional: bool) -> Tensor:
    """``count`` random positions, sorted: the same number, or the same share, of each class.

    The images of each class are shuffled and placed on a line, one step apart, from a random start
    within the first step. A step is 1, or the inverse of the class's size if ``proportional``. The
    first ``count`` images on the line are taken.
    """
    rng = np.random.default_rng(seed)
    classes, member = np.unique(labels.numpy(), return_inverse=True)
    start = rng.random(len(classes))
    place = np.empty(len(labels))
    for number, offset in enumerate(start):
        positions = rng.permutation(np.flatnonzero(member == number))
        step = 1 / len(positions) if proportional else 1
        place[positions] = (np.arange(len(positions)) + offset) * step
    return torch.from_numpy(np.sort(np.argsort(place, kind="stable")[:count]))
