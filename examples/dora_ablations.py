"""What each part of DORA is good for: its ablations, trained and compared at equal cost.

    python examples/dora_ablations.py --out runs/ablations --seeds 3 --jobs 2

Every row of the table is ``tokenenv train`` with one thing changed, once per seed; the threshold of
each trained policy is then set for the same saving, so that rows differ in accuracy alone. Runs
that are finished are not repeated: the same command goes on where it stopped. What follows ``--``
goes to every training, such as ``-- --model deit_tiny_patch16_224 --data imagenet/train``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

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
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--system", choices=("dora", "dora-prune"), help="only this one's rows")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, a core each")
    parser.add_argument("train", nargs="*", help="after --: options of every training")
    args = parser.parse_args()
    rows = [row for row in SETTINGS if args.system in (None, row.split(",")[0])]
    runs = [(row, seed) for seed in range(args.seeds) for row in rows]
    bar = tqdm(total=len(runs), unit="run", smoothing=0)
    with ThreadPoolExecutor(args.jobs) as pool:
        waiting = [pool.submit(train, row, seed, args.out, args.train) for row, seed in runs]
        try:
            for done in waiting:
                done.result()
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    bar.close()
    reports = {
        row: [json.loads((folder(row, seed, args.out) / "report.json").read_text())
              for seed in range(args.seeds)]
        for row in rows
    }  # fmt: skip
    text = table(reports)
    (args.out / "table.md").write_text(text)
    print(text)


def folder(row: str, seed: int, out: Path) -> Path:
    """Of one run."""
    return out / f"{row.replace(', ', '-').replace(' ', '_')}-{seed}"


def train(row: str, seed: int, out: Path, options: list[str]) -> None:
    """Train unless it is done; what is printed goes to ``log.txt`` beside the run."""
    where = folder(row, seed, out)
    if (where / "report.json").exists():
        return
    where.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tokenenv.cli", "train", row.split(",")[0]]
    command += ["--seed", str(seed), "--out", str(where), *options]
    for setting in SETTINGS[row]:
        command += ["--set", setting]
    if (where / "checkpoint.safetensors").exists():
        command.append("--resume")
    with open(where / "log.txt", "a") as log:
        # One thread each: with more, runs beside each other wait for each other.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"'{row}', seed {seed}, failed: see {where / 'log.txt'}")


def table(reports: dict[str, list[dict[str, Any]]]) -> str:
    """Mean over seeds, lowest and highest in brackets, as Markdown."""
    first = next(iter(reports.values()))[0]
    lines = [
        f"{first['images']} images, frozen {first['model']}, {len(next(iter(reports.values())))} "
        "seeds; multiply-adds (1 MAC = 1 FLOP) with the policy's own.",
        "",
        "| variant | MACs saved, % | top-1 lost, pp | same prediction, % | training, s |",
        "|---|---|---|---|---|",
    ]
    for row, of_seeds in reports.items():
        cells = [
            spread([100 * (1 - r["gmacs"] / r["gmacs_dense"]) for r in of_seeds], ".1f"),
            spread([r["top1_dense"] - r["top1"] for r in of_seeds], "+.2f"),
            spread([r["agreement"] for r in of_seeds], ".1f"),
            spread([r["training_seconds"] for r in of_seeds], ".0f"),
        ]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def spread(values: list[float], form: str) -> str:
    """``mean [lowest, highest]``."""
    mean, low, high = (format(f(values), form) for f in (statistics.mean, min, max))
    return f"{mean} [{low}, {high}]"


if __name__ == "__main__":
    main()
