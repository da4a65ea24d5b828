"""What each part of MSTM is good for, and EViT beside it: trained alike, compared at equal tokens.

    python examples/mstm_ablation.py --out runs/mstm-ablation --keep 0.3

Every row of the table is ``tokenenv train`` with one thing changed, once per seed, from the same
pretrained model with the same images in the same order. Runs that are finished are not repeated:
the same command goes on where it stopped. What follows ``--`` goes to every training, such as
``-- --model deit_tiny_patch16_224 --data imagenet/train``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tokenenv.cli import main as tokenenv

ROWS = {
    "top-k by class attention (none)": ("mstm", ["merge=false", "multi_scale=false"]),
    "mergence": ("mstm", ["multi_scale=false"]),
    "two scales": ("mstm", ["merge=false"]),
    "both (MSTM)": ("mstm", []),
    "EViT, fused token": ("evit", []),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/mstm-ablation"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", default="0.7", help="share of the tokens kept at each stage")
    parser.add_argument("train", nargs="*", help="after --: options of every training")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = [(row, seed) for seed in range(args.seeds) for row in ROWS]
    for row, seed in tqdm(runs, unit="run", smoothing=0):
        train(row, folder(args.out, row, seed), [f"--seed={seed}", *args.train], args.keep)
    lines = table(args.out, args.seeds)
    (args.out / "table.md").write_text(lines)
    print(lines)


def folder(out: Path, row: str, seed: int) -> Path:
    """Of one run."""
    number = list(ROWS).index(row)
    return out / f"{number}-{ROWS[row][0]}-{seed}"


def train(row: str, where: Path, options: list[str], keep: str) -> None:
    """Train unless it is done; what is printed goes to ``log.txt`` in the run folder."""
    if (where / "report.json").exists():
        return
    where.mkdir(parents=True, exist_ok=True)
    system, settings = ROWS[row]
    command = ["train", system, "--out", str(where), *options]
    for setting in (f"keep={keep}", *settings):
        command += ["--set", setting]
    if (where / "checkpoint.safetensors").exists():
        command.append("--resume")
    with open(where / "log.txt", "a") as log, contextlib.redirect_stdout(log):
        code = tokenenv(command)
    if code:
        raise SystemExit(f"'{row}' failed: see {where / 'log.txt'}")


def table(out: Path, seeds: int) -> str:
    """Mean over seeds, lowest and highest in brackets, as Markdown."""
    lines = [
        "| variant | MACs saved, % | top-1, % | top-1 lost, pp | same prediction, % |",
        "|---|---|---|---|---|",
    ]
    for row in ROWS:
        reports: list[dict[str, Any]] = [
            json.loads((folder(out, row, seed) / "report.json").read_text())
            for seed in range(seeds)
        ]
        cells = [
            spread([100 * (1 - r["gmacs"] / r["gmacs_dense"]) for r in reports], ".1f"),
            spread([r["top1"] for r in reports], ".2f"),
            spread([r["top1_dense"] - r["top1"] for r in reports], "+.2f"),
            spread([r["agreement"] for r in reports], ".2f"),
        ]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def spread(values: list[float], form: str) -> str:
    """``mean [lowest, highest]``."""
    mean, low, high = (format(f(values), form) for f in (statistics.mean, min, max))
    return f"{mean} [{low}, {high}]"


if __name__ == "__main__":
    main()
