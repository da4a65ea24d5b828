"""LTM on the embedded digits, compared with the dense model fine-tuned in the same way.

    python examples/ltm_digits.py --out runs/ltm-digits
    python examples/ltm_digits.py --out runs/no-bound -- --set eta=0

Both rows of the table are ``tokenenv train ltm``, once per seed, with the same updates, images,
order and distillation; the dense one has a ratio of 1. The bound on the information bottleneck is
measured on held-back images before and after. Finished runs are not repeated, so the same command
resumes. Options after ``--`` are passed to every training, such as
``-- --model deit_tiny_patch16_224 --data imagenet/train``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from repeated import reports, saved, settings, spread, train
from tqdm import tqdm

from tokenenv.cli.options import positive

ROWS: dict[str, list[str]] = {"dense, fine-tuned": ["ratio=1"], "LTM": []}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/ltm-digits"))
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("train", nargs="*", help="after --: options of every training")
    args = parser.parse_args()
    runs = [(row, seed) for seed in range(args.seeds) for row in ROWS]
    for row, seed in tqdm(runs, unit="run", smoothing=0):
        options = [f"--seed={seed}", *args.train, *settings(ROWS[row])]
        train(folder(args.out, row, seed), "ltm", options)
    lines = table(args.out, args.seeds)
    (args.out / "table.md").write_text(lines)
    print(lines)


def folder(out: Path, row: str, seed: int) -> Path:
    """The folder of one run."""
    return out / f"{row.split(',')[0].lower()}-{seed}"


def table(out: Path, seeds: int) -> str:
    """Mean over seeds, lowest and highest in brackets, as Markdown."""
    lines = [
        "| model | MACs saved, % | top-1, % | bound before, nats | after |",
        "|---|---|---|---|---|",
    ]
    for row in ROWS:
        runs = reports([folder(out, row, seed) for seed in range(seeds)])
        bounds = [[h["bound"] for h in r["history"] if "bound" in h] for r in runs]
        cells = [
            saved(runs),
            spread([r["top1"] for r in runs], ".2f"),
            *(spread([b[end] for b in bounds], ".3f") if all(bounds) else "" for end in (0, -1)),
        ]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
