"""ImageNet's folders: whether they are whole, and how the corrupted images lie."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from tokenenv.errors import UserError

CLASSES, TRAINING, VALIDATION = 1000, 1_281_167, 50_000
CLASSES_A, IMAGES_A = 200, 7500

_SHOWN = 3
_PARTS = {"train": ("train",), "val": ("val", "test")}
_SEVERITY = re.compile("[1-5]")


def count(root: Path) -> dict[str, int]:
    """The number of files in each class folder of ``root``, by the folder's name."""
    found = {}
    for entry in sorted(os.scandir(root), key=lambda e: e.name):
        if entry.is_dir() and not entry.name.startswith("."):
            with os.scandir(entry.path) as files:
                found[entry.name] = sum(1 for file in files if not file.name.startswith("."))
    return found


def check_parts(root: str) -> dict[str, dict[str, int]]:
    """Count the images of ``train`` and ``val`` (or ``test``) by class.

    Raises:
        UserError: ``root`` is no folder, or lacks a part.
    """
    if not os.path.isdir(root):
        raise UserError(f"--imagenet '{root}' is no folder: give one that holds train and val")
    found = {}
    for part, names in _PARTS.items():
        there = next((name for name in names if os.path.isdir(os.path.join(root, name))), None)
        if there is None:
            raise UserError(
                f"--imagenet '{root}' holds no folder '{part}': lay it out as train/CLASS/IMAGE "
                "and val/CLASS/IMAGE"
            )
        found[part] = count(Path(root, there))
        if not sum(found[part].values()):
            raise UserError(
                f"'{os.path.join(root, there)}' holds no class folders with images: sort its "
                "images into one folder for each class"
            )
    return found


def check_whole(root: str, parts: Mapping[str, Mapping[str, int]]) -> None:
    """Check that the parts are ImageNet-1K's, complete.

    Args:
        root: the folder, for the message.
        parts: as :func:`check_parts` counted them.

    Raises:
        UserError: classes or images are missing; the message counts and names them.
    """
    for part, images in (("train", TRAINING), ("val", VALIDATION)):
        counts = parts[part]
        if len(counts) < CLASSES or sum(counts.values()) < images:
            raise UserError(f"{_counted(root, part, counts, images)}: complete it, or take --tier "
                            "small, which trains and tests on what is there")  # fmt: skip


def _counted(root: str, part: str, counts: Mapping[str, int], images: int) -> str:
    """How many classes and images a part has of how many, with examples of what is missing."""
    text = (
        f"'{root}' is not whole: '{part}' has {len(counts):,} of {CLASSES:,} classes and "
        f"{sum(counts.values()):,} of {images:,} images"
    )
    missing = [name for name in wnids() if name not in counts]
    few = [name for name, number in counts.items() if number < images / CLASSES]
    if missing:
        return f"{text}; there is no {', '.join(missing[:_SHOWN])}"
    if part == "val" and few:
        return f"{text}; fewer than 50 are in {', '.join(few[:_SHOWN])}"
    return text


def wnids() -> list[str]:
    """The WordNet ids of ImageNet-1K's classes."""
    from timm.data import ImageNetInfo

    names: list[str] = ImageNetInfo("imagenet-1k").label_names()
    return names


def check_adversarial(root: str) -> None:
    """Check that a folder is laid out as ImageNet-A: ``CLASS/IMAGE``.

    Raises:
        UserError: it is not.
    """
    counts = count(Path(root)) if os.path.isdir(root) else {}
    if not sum(counts.values()):
        raise UserError(
            f"--imagenet-a '{root}' is no folder of CLASS/IMAGE: give the unpacked imagenet-a, "
            f"which has {CLASSES_A} classes and {IMAGES_A:,} images"
        )


def corrupted(root: str) -> dict[str, str]:
    """The folders of ImageNet-C, ``CORRUPTION/SEVERITY``, or as unpacked ``GROUP/CORRUPTION/...``.

    Returns:
        The folder of each ``CORRUPTION/SEVERITY``, sorted by name.

    Raises:
        UserError: the folder is laid out otherwise.
    """
    base = Path(root)
    places = [p for pattern in ("*/*", "*/*/*") for p in base.glob(pattern) if p.is_dir()]
    found = {
        f"{place.parent.name}/{place.name}": str(place)
        for place in places
        if _SEVERITY.fullmatch(place.name) and sum(count(place).values())
    }
    if not found:
        raise UserError(
            f"--imagenet-c '{root}' is not laid out as CORRUPTION/SEVERITY/CLASS/IMAGE, with "
            "severities 1 to 5: give the folder with the unpacked tars of ImageNet-C"
        )
    return dict(sorted(found.items()))
