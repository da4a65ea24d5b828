"""Ablations of MSTM, and EViT: trained in the same way, compared at equal numbers of tokens.

    python examples/mstm_ablation.py --out runs/mstm-ablation --keep 0.3

Every row of the table is ``tokenenv train`` with one setting changed, once per seed, from the same
pretrained model with the same images in the same order. Finished runs are not repeated, so the same
command resumes. Options after ``--`` are passed to every training, such as
``-- --model deit_tiny_patch16_224 --data imagenet/train``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from repeated import reports, saved, settings, spread, train
from tqdm import tqdm

from tokenenv.cli.options import positive

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
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--keep", default="0.7", help="share of the tokens kept at each stage")
    parser.add_argument("train", nargs="*", help="after --: options of every training")
    args = parser.parse_args()
    runs = [(row, seed) for seed in range(args.seeds) for row in ROWS]
    for row, seed in tqdm(runs, unit="run", smoothing=0):
        system, changed = ROWS[row]
        options = [f"--seed={seed}", *args.train, *settings([f"keep={args.keep}", *changed])]
        train(folder(args.out, row, seed), system, options)
    lines = table(args.out, args.seeds)
    (args.out / "table.md").write_text(lines)
    print(lines)


def folder(out: Path, row: str, seed: int) -> Path:
    """The folder of one run."""
    number = list(ROWS).index(row)
    return out / f"{number}-{ROWS[row][0]}-{seed}"


def table(out: Path, seeds: int) -> str:
    """Mean over seeds, lowest and highest in brackets, as Markdown."""
    lines = [
        "| variant | MACs saved, % | top-1, % | top-1 lost, pp | same prediction, % |",
        "|---|---|---|---|---|",
    ]
    for row in ROWS:
        runs = reports([folder(out, row, seed) for seed in range(seeds)])
        cells = [
            saved(runs),
            spread([r["top1"] for r in runs], ".2f"),
            spread([r["top1_dense"] - r["top1"] for r in runs], "+.2f"),
            spread([r["agreement"] for r in runs], ".2f"),
        ]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
