"""A source of labelled images, read when asked for.

A source decodes and preprocesses images as its model's timm configuration says, keeps the
decoded bytes while they fit in memory, and leaves unreadable images out instead of failing.
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
)
from tokenenv.errors import UserError


class Batch(NamedTuple):
    """Some images of a source.

    Attributes:
        images: ``(B, C, H, W)`` float32, normalised as the model wants.
        labels: ``(B,)`` int64 indices into the model's head.
        index: ``(B,)`` int64 positions in the source.
    """

    images: Tensor
    labels: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs here


class ImageSource:
    """A list of labelled images, read when asked for; :func:`open_source` makes it.

    Sources made by :meth:`subset`, :meth:`split` and :meth:`share` have the decoded images, and the
    record of unreadable ones, in common with the source they came from.

    Attributes:
        name: what reports call the data set, such as ``"digits:test"``.
        files: ``n`` names relative to the data set's root, such as ``"n01440764/7.jpg"``.
        labels: ``(n,)`` int64 indices into the model's head.
        classes: sorted unique head indices of the whole data set, also in a part of it, so that
            accuracy restricted to them means the same for both.
    """

    def __init__(self, name: str, files: list[str], labels: Tensor, store: PixelStore) -> None:
        self.name = name
        self.files = files
        self.labels = labels
        self.classes = labels.unique()
        self._store = store
        self._positions = list(range(len(files)))  # in the store

    def __len__(self) -> int:
        return len(self.files)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of an image."""
        return self._store.preprocess.shape

    @property
    def skipped(self) -> list[str]:
        """Names of the unreadable images of this source met so far."""
        bad = self._store.unreadable
        return [file for file, p in zip(self.files, self._positions, strict=True) if p in bad]

    @property
    def unreadable(self) -> dict[int, str]:
        """Why images met so far could not be read, by their position in the whole data set."""
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

    def readable(self, index: Tensor) -> Tensor:
        """``(B,)`` bool: not known to be unreadable."""
        bad = self._store.unreadable
        known = [self._positions[i] not in bad for i in index.tolist()]
        return torch.tensor(known, dtype=torch.bool)

    def check_readable(self) -> None:
        """Do nothing, unless all images of this source have turned out unreadable.

        Raises:
            UserError: they have.
        """
        if len(self._store.unreadable) < len(self):  # asked before every batch, of any number
            return
        if len(self.skipped) == len(self):
            reason = self._store.unreadable[self._positions[0]]
            raise UserError(
                f"none of the {len(self)} images of '{self.name}' is readable, for example "
                f"'{self.files[0]}' ({reason}); replace the files"
            )

    def subset(self, n: int, seed: int) -> ImageSource:
        """A random ``n`` of the images, the same number of each class as far as that is possible.

        All of them where there are no more than ``n``.

        Raises:
            UserError: ``n`` is less than one.
        """
        if n < 1:
            raise UserError(f"cannot take {n} images of '{self.name}'; ask for at least 1")
        return self._part(_draw(self.labels, min(n, len(self)), seed, proportional=False))

    def split(self, fraction: float, seed: int) -> tuple[ImageSource, ImageSource]:
        """Two disjoint random parts: ``(the rest, a fraction of the images)``.

        Each class gives its share to both parts as far as that is possible.

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
            name: of the new source.
            alter: gets ``(C, H, W)`` uint8 pixels, resized and cropped, and the image's position
                in the whole data set, which :meth:`subset` and :meth:`split` leave as it is;
                gives pixels of the same shape and type, the same ones each time.
        """
        return self._seen_as(name, AlteredPixels(self._store, alter))

    def augmented(self, augment: Callable[[Tensor], Tensor]) -> ImageSource:
        """The same images, each passed through ``augment`` anew whenever it is read.

        ``augment`` gets ``(C, H, W)`` uint8 pixels, resized and cropped, and gives pixels of the
        same shape and type.
        """
        return self._seen_as(self.name, AugmentedPixels(self._store, augment))

    def share(self, rank: int, of: int, *, even: bool = True) -> ImageSource:
        """Every ``of``-th image from ``rank`` on; the shares are disjoint.

        ``even``: all are equally long, and the images that are left over in none.

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
        other.classes = self.classes
        other._positions = self._positions
        return other

    def _part(self, index: Tensor) -> ImageSource:
        chosen = index.tolist()
        files = [self.files[i] for i in chosen]
        part = ImageSource(self.name, files, self.labels[index], self._store)
        part.classes = self.classes
        part._positions = [self._positions[i] for i in chosen]
        return part


def _draw(labels: Tensor, count: int, seed: int, *, proportional: bool) -> Tensor:
    """``count`` random positions, sorted: the same number, or the same share, of each class.

    Every class shuffles its images and lines them up a step apart, from a random start within
    one step: a step is 1, or the inverse of the class's size. The first ``count`` are taken.
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
