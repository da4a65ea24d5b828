"""How far apart the methods of one or more comparisons are in what they change, image by image.

    tokenenv compare A B ... --data DIR --out compared
    python benchmarks/divergences.py compared
    python benchmarks/divergences.py compared --pair A B --pair A C

Prints of each method what it saves, counted as executed and as published (1 MAC = 1 FLOP, policy
included), its share of the dense model's predictions, and its divergence from these in nats with
1.96 standard errors; of each pair the differences with 95 % intervals, paired by image: Newcombe's
for shares of images, a percentile bootstrap for divergences.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

from tokenenv.errors import UserError, run_script
from tokenenv.measure.paired import paired_difference
from tokenenv.storage import read_tensors


class Method(NamedTuple):
    """A row of a comparison.

    Attributes:
        executed, published: share of the dense model's multiply-adds saved, percent.
        same: ``(n,)`` bool, whether an image has the dense model's prediction.
        divergence: ``(n,)`` nats.
        index: ``(n,)`` positions of the images.
    """

    executed: float
    published: float
    same: NDArray[np.bool_]
    divergence: NDArray[np.float64]
    index: NDArray[np.int64]


def read(folder: Path) -> dict[str, Method]:
    """The rows that ``tokenenv compare --out`` keeps, by what they were named."""
    found = {}
    for path in sorted((folder / "state").glob("*.safetensors")):
        rows, numbers = read_tensors(path)
        saved = [
            100 * (1 - rows[name].double().mean().item() / numbers["dense_macs"])
            for name in ("executed", "macs")
        ]
        same = (rows["reduced"] == rows["dense"]).numpy()
        divergence = rows["divergence"].double().numpy()
        name = numbers["key"].rsplit(" ", 1)[0]
        found[name] = Method(*saved, same, divergence, rows["index"].numpy())
    if not found:
        raise UserError(f"'{folder}' holds no comparison: give the --out of tokenenv compare")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--pair", nargs=2, action="append", default=[], metavar=("A", "B"))
    args = parser.parse_args()
    rows = {name: row for folder in args.folders for name, row in read(folder).items()}
    for name, row in sorted(rows.items(), key=lambda item: item[1].published):
        error = 1.96 * row.divergence.std(ddof=1) / len(row.divergence) ** 0.5
        print(
            f"{name}: saved {row.executed:.1f} %, published {row.published:.1f} %, same "
            f"{100 * row.same.mean():.1f} %, divergence {row.divergence.mean():.4f} +- {error:.4f}"
        )
    for first, second in args.pair:
        if missing := {first, second} - rows.keys():
            raise UserError(f"no row is named {missing.pop()!r}: {', '.join(rows)}")
        a, b = rows[first], rows[second]
        if not np.array_equal(a.index, b.index):
            raise UserError(f"'{first}' and '{second}' were measured on other images")
        apart = a.divergence - b.divergence
        low, high = bootstrap((apart,), np.mean, method="percentile", rng=0).confidence_interval
        print(
            f"{first} - {second}: same {paired_difference(a.same, b.same)} points, divergence "
            f"{apart.mean():+.4f} [{low:+.4f}, {high:+.4f}]"
        )


if __name__ == "__main__":
    run_script(main)
