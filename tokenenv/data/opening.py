"""Opening a set of labelled images: the embedded digits, a folder, a torchvision data set."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import nn

from tokenenv.data.labels import head_outputs, map_classes
from tokenenv.data.pixels import DECODE_THREADS, PixelStore, Preprocess
from tokenenv.data.source import ImageSource
from tokenenv.errors import UserError, check_choice

Split = Literal["train", "test"]

_PART_FOLDERS = {"train": ("train",), "test": ("val", "test")}
_TEST_FRACTION = 0.2


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
            ``NAME`` or ``NAME:ROOT``, downloaded to ``ROOT`` (default ``data``) if torchvision can;
            if it has no test part, a fifth of its images becomes the test part.
        model: the timm classifier; it determines preprocessing and label indices.
        split: which part to open if ``data`` has parts.
        limit: the largest number of images; a random subset balanced over the classes.
        seed: seed of that subset.

    Raises:
        UserError: there is no such data or part, it is empty, or its classes do not fit the model's
            head.
    """
    check_choice("split", split, Split)
    if data in (None, "digits"):
        source = _open_digits(model, split)
    elif os.path.isdir(str(data)):
        source = _open_folder(Path(str(data)), model, split)
    else:
        source = _open_torchvision(str(data), model, split)
    return source if limit is None else source.subset(limit, seed)


def _open_digits(model: nn.Module, split: Split) -> ImageSource:
    from tokenenv.vit.digits import digits

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
    """The folder of ``split`` if ``root`` holds ``train`` and ``val`` or ``test``, else root."""
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
    """Sorted names, relative to ``root``, of the images anywhere below ``root/folder``.

    Links are followed; a folder that several links lead to is read once. Nothing but regular files
    counts as an image: opening a FIFO would wait for a writer. A link that leads nowhere is listed,
    so that it is reported as unreadable.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    found, seen = [], {_identity(str(root / folder))}
    for place, subfolders, names in os.walk(root / folder, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        identities = {name: _identity(os.path.join(place, name)) for name in subfolders}
        # A link comes after real folders: what is reached by both is named by its own path.
        for name in sorted(subfolders, key=lambda name: os.path.islink(os.path.join(place, name))):
            if identities[name] in seen:
                subfolders.remove(name)
            seen.add(identities[name])
        found += [
            (Path(place) / name).relative_to(root).as_posix()
            for name in names
            if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")
            if os.path.isfile(path := os.path.join(place, name)) or not os.path.exists(path)
        ]
    return sorted(found)


def _identity(folder: str) -> tuple[int, int]:
    """Device and inode of a folder, the same by whatever path it is reached."""
    known = os.stat(folder)
    return known.st_dev, known.st_ino


def _what_is_wrong(root: Path, classes: list[str]) -> str:
    if classes:
        return f"no image in its {len(classes)} class folders"
    return "images but no class folders" if _image_files(root, "") else "no class folders"


def _open_torchvision(data: str, model: nn.Module, split: Split) -> ImageSource:
    from tokenenv.data.torchvision_sets import open_named

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
    # One thread: data sets need not be thread-safe (FakeData seeds torch's global generator).
    store = PixelStore(named.load, Preprocess(model))
    whole = ImageSource(f"{named.name}:{split}", files, labels, store)
    if named.has_parts:
        return whole
    train, test = whole.split(_TEST_FRACTION, seed=0)
    return test if split == "test" else train
