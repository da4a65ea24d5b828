"""Single image files, labelled or not, as a source of images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from tokenenv.data.labels import map_classes
from tokenenv.data.pixels import DECODE_THREADS, PixelStore, Preprocess, image_reader
from tokenenv.data.source import ImageSource
from tokenenv.errors import UserError

UNKNOWN = -1
"""The label of an image whose class nobody knows."""


def open_files(files: Sequence[str], model: nn.Module) -> ImageSource:
    """A source of single files, which are read at once; it knows them by name, without folders.

    If the name of a file's folder is a class of the model, that is its label, else
    :data:`UNKNOWN`.

    Args:
        files: paths of images.
        model: the timm classifier; it determines preprocessing and label indices.

    Raises:
        UserError: a file is missing, a folder, or no image; the message names it.
    """
    for file in files:
        if Path(file).is_dir():
            raise UserError(f"'{file}' is a folder: give the image files in it")
        if not Path(file).exists():
            raise UserError(f"there is no file '{file}': give the path of an image")
        if not Path(file).is_file():
            raise UserError(f"'{file}' is no regular file: give the path of an image")

    labels = torch.tensor([_label(Path(file).resolve().parent.name, model) for file in files])
    store = PixelStore(image_reader(files), Preprocess(model), threads=DECODE_THREADS)
    source = ImageSource("the files given", [Path(file).name for file in files], labels, store)
    source.batch(torch.arange(len(source)))
    for position, reason in sorted(source.unreadable.items()):
        raise UserError(f"'{files[position]}' can't be read as an image ({reason}): leave it out")
    return source


def _label(folder: str, model: nn.Module) -> int:
    if not re.search("[^0-9]", folder):  # a folder's number tells nothing
        return UNKNOWN
    try:
        return map_classes([folder], model, folder)[0]
    except UserError:
        return UNKNOWN
