"""Image sources: the embedded digits, folders of images, torchvision data sets.

A source decodes and preprocesses images as its model's timm configuration says, keeps the
decoded bytes while they fit in memory, and leaves unreadable images out instead of failing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tokenenv.errors import UserError
from tokenenv.labels import head_outputs, map_classes
from tokenenv.pixels import DECODE_THREADS, AlteredPixels, AugmentedPixels, PixelStore, Preprocess

Split = Literal["train", "test"]

_PART_FOLDERS = {"train": ("train",), "test": ("val", "test")}
_TEST_FRACTION = 0.2


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


class Stream:
    """Endless batches of a source, each epoch in a new order that follows from the seed.

    Every batch holds exactly ``batch_size`` readable images; it may span two epochs.

    Of several processes each can read its part of every batch; the parts one after the other, by
    rank, are the batch that one process alone would read, and all streams stand at the same place.
    Before, each must know of every image that is unreadable: which one comes next depends on it.

    Args:
        source: of the images.
        batch_size: of the whole batch.
        seed: of the order.
        rank, of: which part of how many. Where ``of`` does not divide ``batch_size`` some parts
            have an image more.

    Raises:
        UserError: ``batch_size`` is less than one, or than ``of``.
    """

    def __init__(
        self, source: ImageSource, batch_size: int, seed: int, rank: int = 0, of: int = 1
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch size {batch_size} is too small; use at least 1")
        if batch_size < of:
            raise UserError(f"{of} processes cannot share a batch of {batch_size}: start fewer")
        self._source = source
        self._batch_size = batch_size
        self._seed = seed
        self._part = slice(batch_size * rank // of, batch_size * (rank + 1) // of)
        self._position = 0
        self._shuffle(epoch=0)

    @property
    def part_size(self) -> int:
        """How many of a batch's images this stream reads."""
        return self._part.stop - self._part.start

    def next(self) -> Batch:
        """Read the next ``batch_size`` images, or this stream's part of them.

        Raises:
            UserError: none of the source's images is readable; or, in a part, one that nobody
                knew of is not.
        """
        if self.part_size < self._batch_size:
            return self._next_part()
        parts: list[Batch] = []
        missing = self._batch_size
        while missing:
            batch = self._source.batch(self._ahead(missing))
            missing -= len(batch.index)
            parts.append(batch)
            if not len(batch.index):
                self._source.check_readable()
        return Batch(*(torch.cat(field) for field in zip(*parts, strict=True)))

    def _next_part(self) -> Batch:
        known: list[Tensor] = []
        missing = self._batch_size
        while missing:
            self._source.check_readable()
            index = self._ahead(missing)
            known.append(index[self._source.readable(index)])
            missing -= len(known[-1])
        mine = torch.cat(known)[self._part]
        batch = self._source.batch(mine)
        if len(batch.index) < len(mine):
            lost = (set(mine.tolist()) - set(batch.index.tolist())).pop()
            raise UserError(
                f"image '{self._source.files[lost]}' can no longer be read: put it back, or take "
                "it away and start anew"
            )
        return batch

    def _ahead(self, count: int) -> Tensor:
        """The next positions of the order, at most ``count``, at least one."""
        if self._position == len(self._order):
            self._position = 0
            self._shuffle(self._epoch + 1)
        index = self._order[self._position : self._position + count]
        self._position += len(index)
        return index

    def state_dict(self) -> dict[str, int]:
        """Where the stream stands; a stream that loads it goes on exactly from there."""
        return {
            "seed": self._seed,
            "epoch": self._epoch,
            "position": self._position,
            "images": len(self._source),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where the stream that gave ``state`` stood.

        Raises:
            UserError: that stream's source had another number of images.
        """
        if int(state["images"]) != len(self._source):
            raise UserError(
                f"the saved stream read {int(state['images'])} images and '{self._source.name}' "
                f"has {len(self._source)}; resume with the data the run was started with"
            )
        self._seed = int(state["seed"])
        self._position = int(state["position"])
        self._shuffle(int(state["epoch"]))

    def _shuffle(self, epoch: int) -> None:
        self._epoch = epoch
        rng = np.random.default_rng([self._seed, epoch])
        self._order = torch.from_numpy(rng.permutation(len(self._source)))


def open_source(
    data: str | None,
    model: nn.Module,
    *,
    split: Split = "test",
    limit: int | None = None,
    seed: int = 0,
) -> ImageSource:
    """Open a set of labelled images for a model.

    Args:
        data: ``None`` or ``"digits"``: scikit-learn's digits, 1197 for training and 600 for
            testing. A folder laid out ``class/image``, or one that holds such folders named
            ``train`` and ``val`` (or ``test``). Otherwise the name of a torchvision data set,
            ``NAME`` or ``NAME:ROOT``, downloaded to ``ROOT`` (``data``) where torchvision can; one
            without a test part gives a fifth of its images as such.
        model: the timm classifier the images are for: it fixes preprocessing and label indices.
        split: which part to open, where ``data`` has parts.
        limit: at most so many images, drawn with ``seed``, balanced over the classes.
        seed: of that draw.

    Raises:
        UserError: there is no such data or part, it is empty, or its classes do not fit the model's
            head.
    """
    if split not in get_args(Split):
        raise UserError(f"split='{split}': choose from {', '.join(get_args(Split))}")
    if data in (None, "digits"):
        source = _open_digits(model, split)
    elif os.path.isdir(str(data)):
        source = _open_folder(Path(str(data)), model, split)
    else:
        source = _open_torchvision(str(data), model, split)
    return source if limit is None else source.subset(limit, seed)


def _open_digits(model: nn.Module, split: Split) -> ImageSource:
    from tokenenv.embedded import digits

    if head_outputs(model) != 10:
        raise UserError(
            f"data 'digits' has 10 classes and the model's head {head_outputs(model)} outputs; "
            "use model 'digits_vit', or give a folder of images the model knows"
        )
    images, labels = digits(split)
    pictures = [Image.fromarray(array) for array in images[:, 0].numpy()]
    files = [f"digits/{split}/{number}" for number in range(len(labels))]
    store = PixelStore(pictures.__getitem__, Preprocess(model))
    return ImageSource(f"digits:{split}", files, labels, store)


def _open_folder(root: Path, model: nn.Module, split: Split) -> ImageSource:
    root = _part_of(root, split)
    classes = sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))
    groups = [_image_files(root, name) for name in classes]
    files = [file for group in groups for file in group]
    if not files:
        raise UserError(
            f"folder '{root}' holds {_what_is_wrong(root, classes)}; lay it out as CLASS/IMAGE, "
            "one folder for each class"
        )

    def load(position: int) -> Image.Image:
        with Image.open(root / files[position]) as image:
            image.load()
            return image

    outputs = torch.tensor(map_classes(classes, model, f"folder '{root}'"))
    labels = outputs.repeat_interleave(torch.tensor([len(group) for group in groups]))
    store = PixelStore(load, Preprocess(model), threads=DECODE_THREADS)
    return ImageSource(_folder_name(root), files, labels, store)


def _part_of(root: Path, split: Split) -> Path:
    """The folder of the asked part, where ``root`` holds ``train`` and ``val`` or ``test``."""
    parts = {
        part: next((root / name for name in names if (root / name).is_dir()), None)
        for part, names in _PART_FOLDERS.items()
    }
    return (parts[split] or root) if all(parts.values()) else root


def _folder_name(root: Path) -> str:
    root = root.resolve()
    generic = any(root.name in names for names in _PART_FOLDERS.values())
    return f"{root.parent.name}/{root.name}" if generic else root.name


def _image_files(root: Path, folder: str) -> list[str]:
    """Sorted names, relative to ``root``, of the images anywhere below ``root/folder``."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    found = []
    for place, subfolders, names in os.walk(root / folder, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [
            (Path(place) / name).relative_to(root).as_posix()
            for name in names
            if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")
        ]
    return sorted(found)


def _what_is_wrong(root: Path, classes: list[str]) -> str:
    if classes:
        return f"no image in its {len(classes)} class folders"
    return "images but no class folders" if _image_files(root, "") else "no class folders"


def _open_torchvision(data: str, model: nn.Module, split: Split) -> ImageSource:
    from tokenenv.torchvision_sets import open_named

    named = open_named(data, split)
    labels = named.targets
    if named.classes:
        labels = torch.tensor(map_classes(named.classes, model, named.name))[labels]
    elif int(labels.max()) >= head_outputs(model):
        raise UserError(
            f"{named.name} has label {int(labels.max())} and the model's head "
            f"{head_outputs(model)} outputs; use a model trained on this data set"
        )
    files = [f"{named.name}/{position}" for position in range(len(labels))]
    # One thread: nobody promises that a data set bears more (FakeData seeds torch's generator).
    store = PixelStore(named.load, Preprocess(model))
    whole = ImageSource(f"{named.name}:{split}", files, labels, store)
    if named.has_parts:
        return whole
    train, test = whole.split(_TEST_FRACTION, seed=0)
    return test if split == "test" else train


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
