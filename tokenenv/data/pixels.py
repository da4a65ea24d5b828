"""From image files to a model's input tensors; each image is decoded once."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tokenenv.artefact import Unfit, check_fields
from tokenenv.errors import UserError, check_choice

CACHE_BYTES = int(1.5 * 2**30)
"""Bytes of decoded images that one data set keeps in memory."""

DECODE_THREADS = min(8, os.cpu_count() or 1)
"""Number of threads that decode image files; Pillow releases the GIL while it decodes."""

AHEAD_BYTES = 2**28
"""Bytes of images that one data set decodes ahead of their use."""


INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
"""timm's names of the filters that resize images."""


_KINDS: dict[str, Any] = {
    "mean": list[float] | None,
    "std": list[float] | None,
    "crop_pct": float | None,
    "interpolation": str | None,
    "image_size": int | list[int] | None,
}
"""The fields of a stored :class:`Preprocessing`, as ``check_fields`` takes them."""


@dataclass(frozen=True)
class Preprocessing:
    """How images become a model's input, in timm's words; None leaves what timm says of the model.

    Attributes:
        mean: of each colour channel, of values from 0 to 1; or one for all.
        std: standard deviation, likewise.
        crop_pct: side of the centre crop as a share of the resized image's shorter side.
        interpolation: of resizing, one of :data:`INTERPOLATIONS`.
        image_size: side, or (height, width), of the model's images, pixels.

    Raises:
        UserError: a value out of its range.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_pct: float | None = None
    interpolation: str | None = None
    image_size: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("mean", "std", "image_size"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, least in (("mean", -math.inf), ("std", 0.0)):
            values = getattr(self, name)
            if values is not None and not (
                len(values) in (1, 3) and all(math.isfinite(v) and v > least for v in values)
            ):
                raise UserError(
                    f"{name}={_slashed(values)}: give 1 or 3 finite numbers"
                    f"{'' if name == 'mean' else ' above 0'}"
                )
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise UserError(f"crop_pct={self.crop_pct:g}: give more than 0, at most 1")
        if self.interpolation is not None:
            check_choice("interpolation", self.interpolation, INTERPOLATIONS)
        sides = self.sides
        if sides is not None and (len(sides) != 2 or min(sides) < 1):
            raise UserError(f"image_size={self.image_size}: give a side of at least 1 pixel")

    @property
    def sides(self) -> tuple[int, ...] | None:
        """Height and width of the model's images, pixels."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else size

    @classmethod
    def of(cls, model: nn.Module) -> Preprocessing:
        """What a timm model is used with."""
        from timm.data import resolve_model_data_config

        config = resolve_model_data_config(model)
        # timm's configuration describes the pretrained weights; a model created with another
        # img_size differs from it.
        embed = getattr(model, "patch_embed", None)
        size = getattr(embed, "img_size", None) or config["input_size"][1:]
        return cls(
            tuple(config["mean"]),
            tuple(config["std"]),
            config["crop_pct"],
            config["interpolation"],
            tuple(size),
        )

    @classmethod
    def from_json(cls, values: Any, path: object) -> Preprocessing:
        """What :meth:`to_json` wrote into the file ``path``.

        Raises:
            UserError: it is something else.
        """
        try:
            check_fields(values, _KINDS, closed=True)
            return cls(**values)
        except (Unfit, UserError) as error:
            raise UserError(f"preprocessing in '{path}': {error}; restore it") from None

    def to_json(self) -> dict[str, Any]:
        """The values, as JSON."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    def over(self, other: Preprocessing) -> Preprocessing:
        """These values, and those of ``other`` where these are None."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return replace(other, **given)

    def apply(self, model: nn.Module) -> None:
        """Make a timm model say so, and take images of this size; None changes nothing.

        Raises:
            UserError: the model can't take images of this size.
        """
        told: Any = model
        given = {name: value for name, value in vars(self).items() if value is not None}
        given.pop("image_size", None)
        sides = self.sides
        if sides is not None and sides != Preprocessing.of(model).sides:
            patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1, 1))
            if any(side % step for side, step in zip(sides, patch, strict=True)):
                raise UserError(
                    f"image_size={_sized(sides)} is no multiple of the model's patches of "
                    f"{_sized(patch)} pixels: give one that is"
                )
            if hasattr(model, "set_input_size"):
                told.set_input_size(img_size=sides)
            channels = told.pretrained_cfg["input_size"][0]
            given["input_size"] = (channels, *sides)
        told.pretrained_cfg = {**told.pretrained_cfg, **given}

    def __str__(self) -> str:
        said = {
            "images of": self.sides and _sized(self.sides),
            "": self.interpolation,
            "crop": self.crop_pct and f"{self.crop_pct:g}",
            "mean": self.mean and _slashed(self.mean),
            "std": self.std and _slashed(self.std),
        }
        return ", ".join(f"{name} {value}".strip() for name, value in said.items() if value)


def _sized(sides: Sequence[int]) -> str:
    return "x".join(map(str, sides))


def _slashed(values: Sequence[float]) -> str:
    return "/".join(f"{value:.4g}" for value in values)


class Preprocess:
    """timm's evaluation transform for a model in two steps: uint8 pixels, then normalisation.

    Attributes:
        shape: ``(C, H, W)`` of the model's images.
        used: the values that it has.

    Raises:
        UserError: the model reads neither 1 nor 3 colour channels.
    """

    def __init__(self, model: nn.Module) -> None:
        from timm.data import create_transform, resolve_model_data_config

        config = resolve_model_data_config(model)
        self.used = Preprocessing.of(model)
        # As with the size, a model created with another in_chans differs from its configuration.
        channels = getattr(model, "in_chans", config["input_size"][0])
        height, width = self.used.image_size  # type: ignore[misc]
        if channels not in (1, 3):
            raise UserError(
                f"the model reads {channels} colour channels and images have 1 or 3; "
                "create it with in_chans=3"
            )
        self.shape = (channels, height, width)
        self._mode = "L" if channels == 1 else "RGB"
        self._mean = self._per_channel(config["mean"])
        self._std = self._per_channel(config["std"])
        config["input_size"] = self.shape
        self._transform = create_transform(**config, is_training=False, normalize=False)

    @classmethod
    def by(cls, preprocessing: Preprocessing, channels: int) -> Preprocess:
        """The transform that values describe, all of them given, without a model."""
        values: dict[str, Any] = preprocessing.to_json()
        size = preprocessing.sides or ()
        config = values | {"input_size": (channels, *size)}
        return cls(cast(Any, SimpleNamespace(pretrained_cfg=config, in_chans=channels)))

    def __call__(self, image: Image.Image) -> Tensor:
        """An image -> ``(C, H, W)`` float32 for the model."""
        return self.normalise([self.pixels(image)])[0]

    def _per_channel(self, values: Sequence[float]) -> Tensor:
        tensor = torch.tensor(values, dtype=torch.float32)
        if len(tensor) != self.shape[0]:
            tensor = tensor.mean().expand(self.shape[0])
        return tensor[:, None, None]

    def pixels(self, image: Image.Image) -> Tensor:
        """Resize and crop to ``(C, H, W)`` uint8."""
        return self._transform(_eight_bit(image).convert(self._mode))

    def normalise(self, pixels: Sequence[Tensor]) -> Tensor:
        """Turn ``B`` tensors ``(C, H, W)`` uint8 into ``(B, C, H, W)`` float32 for the model."""
        if not pixels:
            return torch.empty(0, *self.shape)
        return torch.stack(list(pixels)).float().div_(255).sub_(self._mean).div_(self._std)

    def pixels_of(self, image: Tensor) -> Tensor:
        """Undo :meth:`normalise` for one image ``(C, H, W)``: uint8 pixels, on the CPU."""
        levels = (image.detach().float().cpu() * self._std + self._mean) * 255
        return levels.round().clamp(0, 255).to(torch.uint8)


def image_reader(files: Sequence[str], root: str | Path = "") -> Callable[[int], Image.Image]:
    """A function that reads the image at a position of ``files``, relative to ``root``."""

    def load(position: int) -> Image.Image:
        with Image.open(Path(root, files[position])) as image:
            image.load()
            return image

    return load


class PixelStore:
    """The decoded images of one data set, kept while they fit into ``CACHE_BYTES``.

    Args:
        load: returns the image at a position; may raise any exception for an unreadable one.
        preprocess: preprocessing for the model.
        threads: number of threads that may call ``load`` at the same time.

    Attributes:
        unreadable: reasons why images could not be read so far, by position.
    """

    def __init__(
        self, load: Callable[[int], Image.Image], preprocess: Preprocess, threads: int = 1
    ) -> None:
        self.preprocess = preprocess
        self.unreadable: dict[int, str] = {}
        self._load = load
        self._threads = threads
        self._cache: dict[int, Tensor] = {}
        self._room = CACHE_BYTES
        self._coming: dict[int, Future[Tensor | None]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        """Without threads, which neither a copy nor another process has."""
        return {**vars(self), "_coming": {}, "_pool": None}

    def expect(self, positions: list[int]) -> None:
        """Start to decode in the background what will be read next, as far as it fits.

        What was expected before and not read is forgotten. Images are decoded as :meth:`read`
        would, so that what it returns stays the same.
        """
        if self._threads == 1:
            return
        pool, before = self._workers(), self._coming
        most = AHEAD_BYTES // math.prod(self.preprocess.shape)
        unknown = [p for p in positions if p not in self._cache and p not in self.unreadable]
        self._coming = {
            p: before.pop(p) if p in before else pool.submit(self._decode, p)
            for p in unknown[:most]
        }
        for forgotten in before.values():
            forgotten.cancel()

    def _workers(self) -> ThreadPoolExecutor:
        """The threads of this process; those of one that it was forked from don't run here."""
        if self._pool is None or self._process != os.getpid():
            self._coming, self._process = {}, os.getpid()
            self._pool = ThreadPoolExecutor(self._threads)
        return self._pool

    def read(self, positions: list[int]) -> list[Tensor | None]:
        """``(C, H, W)`` uint8 for each position; None if the image is unreadable."""
        unknown = dict.fromkeys(
            p for p in positions if p not in self._cache and p not in self.unreadable
        )
        fresh = dict(zip(unknown, self._decode_all(list(unknown)), strict=True))
        for position, image in fresh.items():
            if image is not None and image.nbytes <= self._room:
                self._room -= image.nbytes
                self._cache[position] = image
        return [self._cache.get(p, fresh.get(p)) for p in positions]

    def _decode_all(self, positions: list[int]) -> list[Tensor | None]:
        if self._threads == 1:
            return [self._decode(position) for position in positions]
        pool, coming = self._workers(), self._coming
        found = [coming.pop(p) if p in coming else pool.submit(self._decode, p) for p in positions]
        return [future.result() for future in found]

    def _decode(self, position: int) -> Tensor | None:
        try:
            return self.preprocess.pixels(self._load(position))
        except Exception as error:  # Pillow raises many types of exception for bad files
            self.unreadable[position] = one_line(error)
            return None


class AlteredPixels(PixelStore):
    """The images of another store after a deterministic function of them, cached separately.

    Args:
        clean: the other store; unreadable images are the same.
        alter: maps ``(C, H, W)`` uint8 pixels and their position to pixels of the same shape. It
            must be deterministic, because only some results are cached.
    """

    def __init__(self, clean: PixelStore, alter: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__(clean._load, clean.preprocess)
        self.unreadable = clean.unreadable
        self._clean = clean
        self._alter = alter

    def expect(self, positions: list[int]) -> None:
        """Decode what is not cached; it is altered when it is read."""
        self._clean.expect([p for p in positions if p not in self._cache])

    def _decode_all(self, positions: list[int]) -> list[Tensor | None]:
        images = zip(self._clean.read(positions), positions, strict=True)
        return [None if image is None else self._alter(image, p) for image, p in images]


class AugmentedPixels(PixelStore):
    """The images of another store after a random function, applied anew at each reading."""

    def __init__(self, clean: PixelStore, augment: Callable[[Tensor], Tensor]) -> None:
        super().__init__(clean._load, clean.preprocess)
        self.unreadable = clean.unreadable
        self._clean = clean
        self._augment = augment

    def expect(self, positions: list[int]) -> None:
        """Decode; images are augmented when they are read."""
        self._clean.expect(positions)

    def read(self, positions: list[int]) -> list[Tensor | None]:
        """``(C, H, W)`` uint8 for each position; None if the image is unreadable."""
        images = self._clean.read(positions)
        return [None if image is None else self._augment(image) for image in images]


def one_line(error: Exception) -> str:
    """Name and message of any exception on one line, for a ``UserError``."""
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".: ")


def _eight_bit(image: Image.Image) -> Image.Image:
    """Convert an image to a mode from which RGB can be made without clipping or a warning."""
    if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion saturates at 255
        levels = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray((levels // 257).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")
    return image
