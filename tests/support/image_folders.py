"""Folders of small images, readable and not."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def save(path: Path, mode: str = "RGB", shade: int | None = None, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    if shade is not None:
        array[:] = shade
    image = Image.fromarray(array)
    if mode == "I;16":
        image = Image.fromarray(array[..., 0].astype(np.uint16) * 257)
    image.convert(mode).save(path)
    return path


def make_folder(root: Path, classes: dict[str, int]) -> Path:
    """A folder with so many images of each class, every image different."""
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            save(root / name / f"{number:02}.png", seed=zlib.crc32(f"{name}/{number}".encode()))
    return root


def corrupt(root: Path) -> list[str]:
    """Put unreadable files of every kind into class ``0`` and name them."""
    whole = save(root / "0" / "whole.jpg").read_bytes()
    (root / "0" / "whole.jpg").unlink()
    png = (root / "0" / "00.png").read_bytes()
    kinds = {
        "cut.jpg": whole[: len(whole) // 2],
        "cut.png": png[: len(png) // 2],
        "empty.jpg": b"",
        "garbage.png": bytes(range(256)) * 8,
        "header.bmp": b"BM",
        "text.webp": b"not an image\n",
    }
    for name, content in kinds.items():
        (root / "0" / name).write_bytes(content)
    (root / "0" / "dangling.jpg").symlink_to(root / "nowhere.jpg")
    return sorted([f"0/{name}" for name in [*kinds, "dangling.jpg"]])
