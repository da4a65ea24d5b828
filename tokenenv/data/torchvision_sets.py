"""Open torchvision's data sets by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokenenv.data.pixels import one_line
from tokenenv.errors import UserError

# torchvision's data sets have different names for the same part.
_PART_NAMES = {"train": ("train", "trainval", "train-standard"), "test": ("test", "val", "valid")}


class NamedSet(NamedTuple):
    """A torchvision data set.

    Attributes:
        name: its name in torchvision.
        load: returns the image at a position; not thread-safe.
        targets: ``(n,)`` int64 labels in the data set's own numbering.
        classes: WordNet id or name(s) of each class; None if the data set has none.
        has_parts: whether it has a train and a test part; the set then is only the one asked for.
    """

    name: str
    load: Callable[[int], Image.Image]
    targets: Tensor
    classes: Sequence[str | Sequence[str]] | None
    has_parts: bool


def open_named(data: str, split: str) -> NamedSet:
    """Open ``NAME`` or ``NAME:ROOT``, downloading it to ``ROOT`` (default ``data``) if possible.

    Args:
        data: name, in any case, of a class in ``torchvision.datasets``, and its folder.
        split: ``"train"`` or ``"test"``.

    Raises:
        UserError: there is no such data set, it cannot be opened, or it has no class labels.
    """
    from torchvision import datasets

    name, _, root = data.partition(":")
    known = {known.lower(): known for known in datasets.__all__ if known != "VisionDataset"}
    if name.lower() not in known:
        raise UserError(
            f"data '{data}' is neither a folder nor a torchvision data set (NAME or NAME:ROOT); "
            "check the path, or leave it out where the model has digits of its own"
        )
    name = known[name.lower()]
    dataset, has_parts = _construct(getattr(datasets, name), name, root or "data", split)
    targets = _targets(dataset, name)
    classes = getattr(dataset, "wnids", None) or getattr(dataset, "classes", None)
    return NamedSet(name, lambda position: dataset[position][0], targets, classes, has_parts)


def _construct(cls: Callable[..., Any], name: str, root: str, split: str) -> tuple[Any, bool]:
    """The data set, and whether it has a train and a test part."""
    parameters = inspect.signature(cls).parameters
    given = {"root": root, "download": True}
    arguments = {key: value for key, value in given.items() if key in parameters}

    choices: list[dict[str, Any]] = [{}]
    if "train" in parameters:
        choices = [{"train": split == "train"}]
    elif "split" in parameters:
        choices = [{"split": part} for part in _PART_NAMES[split]]

    problem: Exception | None = None
    for choice in choices:
        try:
            return cls(**arguments, **choice), choice != {}
        except ValueError as error:  # mostly: the part has another name in this data set
            problem = problem or error
        except Exception as error:  # no network, no archive, no permission: many types
            problem = error
            break
    assert problem is not None
    raise UserError(
        f"torchvision's {name} cannot be opened in '{root}' ({one_line(problem)}); check the "
        "network, put its files there yourself, or give a folder laid out CLASS/IMAGE"
    )


def _targets(dataset: Any, name: str) -> Tensor:
    """``(n,)`` int64 labels, without decoding images if the data set lists its labels."""
    listed: Any = None
    for attribute in ("targets", "labels", "_labels"):
        if listed is None:
            listed = getattr(dataset, attribute, None)
    try:
        if listed is None:
            samples = getattr(dataset, "_samples", dataset)
            listed = [samples[position][1] for position in range(len(dataset))]
        targets = torch.from_numpy(np.asarray(listed).astype(np.int64, casting="same_kind"))
    except Exception as error:  # other contents than one whole number per image
        raise _no_labels(name) from error
    if targets.shape != (len(dataset),) or not len(targets):
        raise _no_labels(name)
    return targets


def _no_labels(name: str) -> UserError:
    return UserError(
        f"torchvision's {name} has no class label for each image; choose a data set made for "
        "classification, such as CIFAR10"
    )
