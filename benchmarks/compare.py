"""Paired comparison of two evaluations of the same images.

    tokenenv evaluate A ... --json a.json; tokenenv evaluate B ... --json b.json
    python benchmarks/compare.py a.json b.json

Prints the difference in top-1 of each to the dense model and to each other, in percentage points,
with a 95 % interval (Newcombe's method 10 for paired proportions). To compare many policies with
the dense model, use tokenenv compare.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from tokenenv.errors import UserError, run_script
from tokenenv.measure.paired import paired_difference


def read_report(path: Path) -> Any:
    """The file that ``tokenenv evaluate --json`` wrote."""
    try:
        found = json.loads(path.read_text())
        found["predictions"]  # a report of another command has none
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"'{path}' is no file of tokenenv evaluate --json ({type(error).__name__})"
        ) from None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    args = parser.parse_args()
    reports = [read_report(path) for path in (args.first, args.second)]
    rows = [{p["file"]: p for p in report["predictions"]} for report in reports]
    files = sorted(rows[0].keys() & rows[1].keys())
    if not files:
        parser.error("the two have no image in common")
    hits = [
        np.array([[row[f][key] == row[f]["label"] for key in ("reduced", "dense")] for f in files])
        for row in rows
    ]
    print(f"{len(files)} images in common; GMACs with 1 MAC = 1 FLOP, policy included")
    for path, report, hit in zip((args.first, args.second), reports, hits, strict=True):
        saved = 100 * (1 - report["gmacs"] / report["gmacs_dense"])
        print(
            f"{path.name}: {report['gmacs']:.4f} GMACs (-{saved:.1f} %), "
            f"top-1 {100 * hit[:, 0].mean():.2f}, dense {100 * hit[:, 1].mean():.2f}, "
            f"difference {interval(hit[:, 0], hit[:, 1])}"
        )
    print(f"{args.first.name} - {args.second.name}: {interval(hits[0][:, 0], hits[1][:, 0])}")


def interval(first: np.ndarray, second: np.ndarray) -> str:
    """Mean paired difference in percentage points and its 95 % interval."""
    mean, low, high = paired_difference(first, second)
    return f"{mean:+.2f} pp [{low:+.2f}, {high:+.2f}]"


if __name__ == "__main__":
    run_script(main)
