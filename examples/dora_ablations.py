"""Ablations of DORA, trained and compared at equal cost.

    python examples/dora_ablations.py --out runs/ablations --seeds 3 --jobs 2

Every row of the table is ``tokenenv train`` with one setting changed, once per seed. The threshold
of each trained policy is then set so that all rows have about the same saving; accuracies of rows
whose savings differ can't be compared directly. Finished runs are not repeated, so the same command
resumes. Options after ``--`` are passed to every training, such as
``-- --model deit_tiny_patch16_224 --data imagenet/train``.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from repeated import reports, saved, settings, spread, train
from tqdm import tqdm

from tokenenv.cli.options import positive

SETTINGS = {
    "dora": [],
    "dora, terminal reward only": ["terminal=True"],
    "dora, fixed coefficient": ["closed_loop=False"],
    "dora, symmetric critic": ["critic=symmetric"],
    "dora, similarity alone is seen": ["features=similarity"],
    "dora-prune": [],
    "dora-prune, terminal reward only": ["terminal=True"],
    "dora-prune, fixed coefficient": ["closed_loop=False"],
    "dora-prune, symmetric critic": ["critic=symmetric"],
    "dora-prune, random selector": ["selector=random"],
    "dora-prune, redundancy selector": ["selector=redundancy"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--system", choices=("dora", "dora-prune"), help="only this one's rows")
    parser.add_argument("--jobs", type=positive, default=2, help="trainings at a time, a core each")
    parser.add_argument("train", nargs="*", help="after --: options of every training")
    args = parser.parse_args()
    rows = [row for row in SETTINGS if args.system in (None, row.split(",")[0])]
    runs = [(row, seed) for seed in range(args.seeds) for row in rows]
    bar = tqdm(total=len(runs), unit="run", smoothing=0)
    with ThreadPoolExecutor(args.jobs) as pool:
        waiting = [pool.submit(train_row, row, seed, args.out, args.train) for row, seed in runs]
        try:
            for done in waiting:
                done.result()
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    bar.close()
    text = table(
        {row: reports([folder(row, s, args.out) for s in range(args.seeds)]) for row in rows}
    )
    (args.out / "table.md").write_text(text)
    print(text)


def folder(row: str, seed: int, out: Path) -> Path:
    """The folder of one run."""
    return out / f"{row.replace(', ', '-').replace(' ', '_')}-{seed}"


def train_row(row: str, seed: int, out: Path, options: list[str]) -> None:
    """Train one row with one seed."""
    options = [f"--seed={seed}", *options, *settings(SETTINGS[row])]
    train(folder(row, seed, out), row.split(",")[0], options)


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Mean over seeds, lowest and highest in brackets, as Markdown."""
    first = next(iter(found.values()))[0]
    lines = [
        f"{first['images']} images, frozen {first['model']}, {len(next(iter(found.values())))} "
        "seeds; multiply-adds (1 MAC = 1 FLOP) with the policy's own.",
        "",
        "| variant | MACs saved, % | top-1 lost, pp | same prediction, % | training, s |",
        "|---|---|---|---|---|",
    ]
    for row, of_seeds in found.items():
        cells = [
            saved(of_seeds),
            spread([r["top1_dense"] - r["top1"] for r in of_seeds], "+.2f"),
            spread([r["agreement"] for r in of_seeds], ".1f"),
            spread([r["training_seconds"] for r in of_seeds], ".0f"),
        ]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
