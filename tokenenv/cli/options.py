"""Options that several commands share. Imports neither torch nor timm."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tokenenv.errors import UserError
from tokenenv.paths import as_path

if TYPE_CHECKING:
    from tokenenv.data import Preprocessing


class Parser(argparse.ArgumentParser):
    """A parser that reports a mistake in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with status 2."""
        if "--traceback" in message:
            message += " (--traceback stands before the command)"
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


WHAT = (
    "a method such as tome:r=8, evit:keep=0.7 or resize:size=192 ('tokenenv methods' lists them), "
    "a run folder (LTM's too), a compressed model's folder or a shipped policy (policies also with "
    ":threshold=0.6), or your own module:Name:key=value or path/to/file.py:Name:key=value"
)


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--trust``."""
    parser.add_argument(
        "--trust",
        action="store_true",
        help="run third-party code that a saved method names",
    )


@contextlib.contextmanager
def writable_file(path: str | None, option: str = "--json") -> Iterator[None]:
    """Check that the file which ``option`` names can be written, before any work.

    Raises:
        UserError: the file cannot be written.
    """
    from tokenenv.storage import is_stream, writable_folder

    if path is None or is_stream(as_path(path, option)):
        yield
        return
    if Path(path).is_dir():
        raise UserError(f"{option} '{path}' is a folder: give the name of a file")
    with writable_folder(Path(os.path.realpath(path) if os.path.islink(path) else path).parent):
        yield


def add_execution(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--execution``."""
    parser.add_argument(
        "--execution",
        choices=("masked", "padded", "packed"),
        help="how images of different lengths share a batch (default: packed on a CPU, masked "
        "elsewhere)",
    )


def add_model_options(
    parser: argparse.ArgumentParser, *, images: bool = True, preprocessing: bool = True
) -> None:
    """Add ``--model``, ``--weights``, ``--device`` and, where ``images`` are read, ``--data``.

    ``preprocessing``: whether to add the options that :func:`preprocessing` reads.
    """
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="any timm ViT, or one that comes with weights and images of its own: digits_vit (the "
        "default) and digits_vit_16, digits as 64 or 256 tokens, and scenes_vit, digits among "
        "clutter as 144, or scenes_vit_patch2 as 576; for LTM also a Swin, MobileViT or "
        "EfficientViT",
    )
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help=".safetensors or .pth state dict or checkpoint; random: untrained ones, no download",
    )
    if images:
        parser.add_argument(
            "--data",
            metavar="DIR",
            help="folder of class/image, or a torchvision data set such as CIFAR10:ROOT",
        )
    parser.add_argument("--device", default="cpu", metavar="D", help="cpu, cuda ...; default: cpu")
    if not preprocessing:
        return
    own = parser.add_argument_group("preprocessing", "in place of what timm says of the model")
    own.add_argument("--mean", type=float, nargs="+", metavar="M", help="of 1 or 3 channels")
    own.add_argument("--std", type=float, nargs="+", metavar="S", help="of 1 or 3 channels")
    own.add_argument("--crop-pct", type=float, metavar="P", help="centre crop, as a share")
    own.add_argument("--interpolation", metavar="NAME", help="bilinear, bicubic ...")
    own.add_argument("--image-size", type=positive, metavar="N", help="side, pixels")


def preprocessing(args: argparse.Namespace) -> Preprocessing:
    """What the options of :func:`add_model_options` say of the preprocessing."""
    from tokenenv.data import Preprocessing

    names = ("mean", "std", "crop_pct", "interpolation", "image_size")
    return Preprocessing(**{name: getattr(args, name) for name in names})


def add_dtype(
    parser: argparse.ArgumentParser, what: str = "precision of the models; policies use float32"
) -> None:
    """Add the option ``--dtype``; ``what``: its help."""
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help=f"{what}; default: float32",
    )


def positive(text: str) -> int:
    """A whole number from 1, as argparse's ``type``."""
    return _whole(text, 1, 2**31 - 1)


def batches(text: str) -> list[int]:
    """Batch sizes separated by commas, as argparse's ``type``."""
    return [positive(part) for part in text.split(",")]


def positions(text: str) -> list[int]:
    """Positions from 0 separated by commas, as argparse's ``type``."""
    return [_whole(part, 0, 2**31 - 1) for part in text.split(",")]


def seeds(text: str) -> list[int]:
    """Seeds separated by commas, each once, as argparse's ``type``."""
    return list(dict.fromkeys(seed(part) for part in text.split(",")))


def seed(text: str) -> int:
    """A whole number from 0, as argparse's ``type``."""
    return _whole(text, 0, 2**32 - 1)


def _whole(text: str, low: int, high: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number from {low} to {high}")
    return value
