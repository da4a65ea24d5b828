"""Time ONNX files beside the dense model, all in ONNX Runtime and nothing else in the process.

    python benchmarks/onnx_speed.py fast.onnx [MORE.onnx] --batch 1,8 --threads 2

The dense model is the one whose weights the first file holds. ``tokenenv bench fast.onnx`` times
the dense model in PyTorch, too, between ONNX Runtime's turns, whose threads then start anew.
"""

from __future__ import annotations

import argparse
import itertools
import time

import numpy as np
import torch

from tokenenv.cli.options import batches, positive
from tokenenv.deploy.onnx import dense_onnx
from tokenenv.deploy.runtime import load_onnx
from tokenenv.errors import run_script
from tokenenv.measure.speed import fresh_batches, pool_size
from tokenenv.vit.load import load_backbone

SECONDS = 0.2
"""Least duration of one timing."""


def main() -> None:
    """Print the median time of each model, and the ratio to the dense one in the same round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--batch", type=batches, default=[1, 8])
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--rounds", type=positive, default=11)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models = {file: load_onnx(file) for file in args.files}
    first = models[args.files[0]]
    dense = load_backbone(first.said["model"], args.files[0])
    runs = {"dense": dense_onnx(dense.model), **models}
    generator = torch.Generator().manual_seed(0)
    for batch in args.batch:
        images = torch.randn((pool_size(batch), *first.shape), generator=generator)
        # Drawn before: torch's threads wait actively after each operation, on ONNX Runtime's cores.
        drawn = list(itertools.islice(fresh_batches(images, batch), 4 * len(images) // batch))
        fresh = itertools.cycle(drawn)
        took: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(args.rounds):
            for name, run in runs.items():
                run(next(fresh))
                start, passes = time.perf_counter(), 0
                while time.perf_counter() - start < SECONDS:
                    run(next(fresh))
                    passes += 1
                took[name].append((time.perf_counter() - start) / passes)
        for name, seconds in took.items():
            ratio = np.quantile(np.array(took["dense"]) / np.array(seconds), [0.25, 0.5, 0.75])
            print(
                f"batch {batch}: {name:30} {1e3 * np.median(seconds):8.2f} ms, "
                f"{ratio[1]:.2f} x ({ratio[0]:.2f}-{ratio[2]:.2f})"
            )


if __name__ == "__main__":
    run_script(main)
