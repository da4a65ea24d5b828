"""Policies on corrupted images they were not trained on: ImageNet-C's corruptions, unchanged.

    pip install imagecorruptions-imaug    # the package in the extra "corruptions"
    python benchmarks/corruptions.py tome:r=8 cls-attention:keep=0.8 --model deit_tiny_patch16_224
        --weights deit_tiny_patch16_224.safetensors --data imagenet/val --limit 1000
        --severities 1/3/5 --json corruptions.json

One row for each corruption, mean over the severities: the dense model's top-1, each policy's top-1
and the share of multiply-adds it saves (1 MAC = 1 FLOP, policy included, frozen backbone), and the
difference in top-1 between the first two policies (of a single one: to the dense model), paired,
with a 95 % interval over the images (tokenenv.measure.paired). The row "clean",
without corruption, is not part of the mean in the last line. Ctrl-C ends it with the mean of the
rows done so far.

The 15 corruptions of Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations" (ICLR 2019), at their 5 severities, come from the package
imagecorruptions-imaug: the maintained fork of imagecorruptions, which fails on today's numpy,
scikit-image and setuptools. They change the 8-bit image after the model's own resize and crop and
before its normalisation. The numbers are not those of the published ImageNet-C files: these went
through a second JPEG compression (quality 85) and a crop of their own; the package blurs motion
(motion_blur, snow) without ImageMagick, its elastic_transform has other amplitudes and no affine
part, and it takes 6 frost pictures, enlarged by a tenth, instead of 5. The noise follows from the
image's position in the data set, the corruption and the severity, so every policy sees the same
pixels, whatever the limit and the order.

On one core corrupting an image of 224 x 224 takes from under 1 ms (pixelate) to about 50 ms
(zoom_blur), 9 ms on average; the first glass_blur waits some seconds for its compiler.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare import interval
from torch import Tensor
from tqdm import tqdm

from agents.policies.words import parse_policy
from tokenenv.cli.options import writable_file
from tokenenv.data import ImageSource, open_source
from tokenenv.data.pixels import one_line
from tokenenv.errors import UserError
from tokenenv.game.policy import Policy
from tokenenv.measure import evaluation
from tokenenv.measure.opening import named_model
from tokenenv.measure.printing import MAC_NOTE, report_skipped
from tokenenv.storage import write_json
from tokenenv.vit.backbone import Backbone

CORRUPTIONS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
"""ImageNet-C's test corruptions, in the paper's order; the place of one is part of its seed."""

SEVERITIES = (1, 2, 3, 4, 5)

SMALLEST = 32
"""Height and width the package asks for, pixels."""

_OWN_GENERATOR = ("impulse_noise", "glass_blur")


@dataclass
class Row:
    """The results under one corruption.

    Attributes:
        name: name of the corruption, or ``"clean"``.
        dense: ``(n,)`` for each image, the share of severities at which the dense model is correct.
        right: the same for each policy.
        saved: multiply-adds that each policy saves, percent, mean over images and severities.
        severities: the results at each severity, for ``--json``.
    """

    name: str
    dense: np.ndarray
    right: list[np.ndarray]
    saved: list[float]
    severities: list[dict[str, Any]] = field(default_factory=list)

    def difference(self) -> str:
        """First minus second policy (or the dense model), points, with its 95 % interval."""
        return interval(self.right[0], self.right[1] if len(self.right) > 1 else self.dense)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 when done, 2 for a user's mistake, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="+", metavar="WHAT", help="a policy, as tokenenv evaluate's")
    parser.add_argument("--model", required=True, metavar="NAME", help="any timm ViT")
    parser.add_argument("--weights", metavar="FILE", help=".safetensors or .pth state dict")
    parser.add_argument("--data", required=True, metavar="DIR", help="folder of class/image")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N images")
    parser.add_argument("--severities", default="1/2/3/4/5", metavar="1/3/5", help="default: all")
    parser.add_argument(
        "--corruptions", default="/".join(CORRUPTIONS), metavar="A/B", help="default: all 15"
    )
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument("--device", default="cpu", metavar="D", help="cpu, cuda ...; default: cpu")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there")
    args = parser.parse_args(argv)
    try:
        return run(args)
    except UserError as error:
        print(f"corruptions: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("corruptions: interrupted", file=sys.stderr)
        return 130


def run(args: argparse.Namespace) -> int:
    """The work of :func:`main`, with the user's mistakes raised as ``UserError``."""
    names, severities = parse_corruptions(args.corruptions), parse_severities(args.severities)
    if args.batch < 1:
        raise UserError(f"--batch {args.batch} is too small; use at least 1")
    library()  # before minutes of work
    with writable_file(args.json):
        named = named_model(args.model, args.weights, args.device, "float32")
        backbone, model = named.open_backbone(args.data), named.name
        policies = [parse_policy(what, backbone.depth) for what in args.what]
        for policy in policies:
            policy.check_fit(backbone, model)
            policy.on(backbone.device)
        source = open_source(args.data, backbone.model, split="test", limit=args.limit)
        check_images(source)
        print(f"{model}, {len(source)} images of {source.name}; {MAC_NOTE}")
        print(f"severities {args.severities}; top-1 and MACs saved in percent")
        for number, what in enumerate(args.what, 1):
            print(f"  policy {number}: {what}")
        print(heading(len(policies)))
        rows: list[Row] = []
        interrupted = False
        sweeps = 1 + len(names) * len(severities)
        total = sweeps * len(policies) * len(source)
        with tqdm(total=total, unit="image", leave=False, disable=None) as bar:
            try:
                for name in ("clean", *names):
                    levels = severities if name != "clean" else [0]
                    rows.append(measure(backbone, policies, source, name, levels, args.batch, bar))
                    tqdm.write(line(rows[-1]))
            except KeyboardInterrupt:
                interrupted = True
        report_skipped(source)
        done = rows[1:]
        if done:
            overall = mean(done)
            print(line(overall))
        if interrupted:
            print(f"interrupted: {len(done)} of {len(names)} corruptions are done")
        if args.json and done:
            head = {"model": model, "data": source.name, "images": len(overall.dense)}
            head |= {"severities": severities, "note": MAC_NOTE, "interrupted": interrupted}
            table = [as_json(row, args.what) for row in (*rows, overall)]
            write_json(Path(args.json), {**head, "policies": args.what, "rows": table})
            print(f"the numbers are in {args.json}")
    return 130 if interrupted else 0


def measure(
    backbone: Backbone,
    policies: list[Policy],
    source: ImageSource,
    name: str,
    severities: list[int],
    batch_size: int,
    bar: tqdm[Any],
) -> Row:
    """All policies under one corruption; ``"clean"`` leaves the images as they are.

    The dense model sees each image once per severity, with the first policy.
    """
    dense_hits: list[Tensor] = []
    hits: list[list[Tensor]] = [[] for _ in policies]
    saved: list[list[float]] = [[] for _ in policies]
    levels = []
    for severity in severities:
        bar.set_description(f"{name} {severity}" if severity else name)
        # The last one's cache goes with it: two at once would double the memory.
        seen = source if name == "clean" else corrupted(source, name, severity)
        dense: Tensor | None = None
        for number, policy in enumerate(policies):
            result = evaluation.evaluate(
                backbone, policy, seen, batch_size=batch_size, dense=dense, progress=bar.update
            )
            if dense is None:
                dense = torch.full((len(seen),), -1).index_put((result.index,), result.dense)
                dense_hits.append(result.dense == result.labels)
            hits[number].append(result.reduced == result.labels)
            saved[number].append(result.saving)
        levels.append(
            {
                "severity": severity,
                "top1_dense": percent(dense_hits[-1]),
                "top1": [percent(own[-1]) for own in hits],
                "saved": [own[-1] for own in saved],
            }
        )
    return Row(
        name,
        share(dense_hits),
        [share(own) for own in hits],
        [float(np.mean(own)) for own in saved],
        levels,
    )


def share(hits: list[Tensor]) -> np.ndarray:
    """``(n,)`` bool of each severity -> ``(n,)`` float64 share of them."""
    return torch.stack(hits).double().mean(0).numpy()


def percent(hits: Tensor) -> float:
    return 100 * hits.double().mean().item()


def mean(rows: list[Row]) -> Row:
    """Every corruption counts the same; the interval then is over images, not image views."""
    return Row(
        "mean",
        np.mean([row.dense for row in rows], axis=0),
        list(np.mean([row.right for row in rows], axis=0)),
        np.mean([row.saved for row in rows], axis=0).tolist(),
    )


def corrupted(source: ImageSource, name: str, severity: int) -> ImageSource:
    """The same images under one of :data:`CORRUPTIONS`, the same pixels each time.

    Args:
        source: images ``(3, H, W)`` of at least 32 x 32 pixels.
        name: of the corruption.
        severity: 1 to 5.

    Raises:
        UserError: unknown corruption, severity out of range, or the library is missing.
    """
    check(name, severity)
    change = partial(corrupt, library(), name, severity)
    return source.altered(f"{source.name} ({name} {severity})", change)


def corrupt(
    apply: Callable[..., np.ndarray], name: str, severity: int, pixels: Tensor, position: int
) -> Tensor:
    """``(3, H, W)`` uint8 -> the same, corrupted; ``position`` seeds, numpy's state stays."""
    words = np.random.SeedSequence([position, CORRUPTIONS.index(name), severity])
    seed = int(words.generate_state(1)[0])
    # Two of them draw from generators of their own, the others from numpy's global one.
    own = {"seed": seed} if name in _OWN_GENERATOR else {}
    state = np.random.get_state()
    try:
        np.random.seed(seed)
        image = apply(
            pixels.permute(1, 2, 0).contiguous().numpy(),
            severity=severity,
            corruption_name=name,
            **own,
        )
    finally:
        np.random.set_state(state)
    return torch.tensor(image.transpose(2, 0, 1).copy())


def library() -> Callable[..., np.ndarray]:
    """``imagecorruptions.corrupt``.

    Raises:
        UserError: the package, or the fork that takes seeds, is not installed.
    """
    try:
        # Two packages have this module; only the fork's distribution will do.
        importlib.metadata.version("imagecorruptions-imaug")
        return importlib.import_module("imagecorruptions").corrupt
    except ImportError as error:
        raise UserError(
            f"cannot use the package imagecorruptions-imaug ({one_line(error)}): "
            "pip install imagecorruptions-imaug"
        ) from None


def check_images(source: ImageSource) -> None:
    """Check that the library supports images of this size.

    Raises:
        UserError: they are grey or too small.
    """
    channels, height, width = source.batch(torch.tensor([0])).images.shape[1:]
    if channels != 3 or min(height, width) < SMALLEST:
        raise UserError(
            f"the model reads images of {channels} x {height} x {width} and the corruptions are "
            f"for 3 colours and at least {SMALLEST} x {SMALLEST} pixels: choose another model"
        )


def check(name: str, severity: int) -> None:
    """Check that the library has a corruption and a severity.

    Raises:
        UserError: unknown corruption, or severity out of range.
    """
    if name not in CORRUPTIONS:
        raise UserError(f"unknown corruption '{name}': choose from {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise UserError(f"severity {severity} is out of range: choose from 1 to 5")


def parse_corruptions(text: str) -> list[str]:
    """``"fog/snow"`` -> ``["fog", "snow"]``, each once.

    Raises:
        UserError: an unknown one.
    """
    names = list(dict.fromkeys(text.split("/")))
    for name in names:
        check(name, 1)
    return names


def parse_severities(text: str) -> list[int]:
    """``"1/3/5"`` -> ``[1, 3, 5]``, each once.

    Raises:
        UserError: no whole number from 1 to 5.
    """
    try:
        severities = list(dict.fromkeys(int(part) for part in text.split("/")))
    except ValueError:
        raise UserError(f"severities '{text}' must be numbers from 1 to 5 such as 1/3/5") from None
    for severity in severities:
        check(CORRUPTIONS[0], severity)
    return severities


def heading(policies: int) -> str:
    cells = "".join(f"{f'top-1 ({n})':>11}{f'saved ({n})':>11}" for n in range(1, policies + 1))
    other = "(1) - (2)" if policies > 1 else "(1) - dense"
    return f"{'corruption':18}{'dense':>7}{cells}   {other} [95 %]"


def line(row: Row) -> str:
    cells = "".join(
        f"{100 * right.mean():11.2f}{saved:11.2f}"
        for right, saved in zip(row.right, row.saved, strict=True)
    )
    return f"{row.name:18}{100 * row.dense.mean():7.2f}{cells}   {row.difference()}"


def as_json(row: Row, what: list[str]) -> dict[str, Any]:
    policies = [
        {"policy": name, "top1": 100 * float(right.mean()), "saved": saved}
        for name, right, saved in zip(what, row.right, row.saved, strict=True)
    ]
    return {
        "corruption": row.name,
        "top1_dense": 100 * float(row.dense.mean()),
        "policies": policies,
        "difference": row.difference(),
        "severities": row.severities,
    }


if __name__ == "__main__":
    sys.exit(main())
