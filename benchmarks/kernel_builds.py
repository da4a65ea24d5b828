"""How many kernels oneDNN builds for each of many fresh batches of a compressed model.

It builds one for every new size of a matrix product, which takes longer than a small product.
A method that gives each image a length of its own must not meet new sizes for ever::

    python benchmarks/kernel_builds.py dora-deit_tiny merge-above:similarity=0.9 --weights FILE \
        --data DIR --batch 8 --batches 200

prints, for each method, the kernels built in the 1st batch, up to the 5th, 10th, 20th and so on.
Half precision on a CPU; other products don't go through oneDNN.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import torch

import agents
import tokenenv
from agents.policies import shipped
from tokenenv.cli.options import positive
from tokenenv.data import open_source
from tokenenv.errors import run_script
from tokenenv.measure.speed import fresh_batches
from tokenenv.vit.load import load_model, untrained_model

_MARK = "batch done"


def main() -> None:
    """Read the arguments, and count in a process of its own for each method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="+")
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--weights", help="leave out for random weights")
    parser.add_argument("--data", required=True)
    parser.add_argument("--batch", type=positive, default=8)
    parser.add_argument("--batches", type=positive, default=200)
    args = parser.parse_args()
    if os.environ.get("ONEDNN_VERBOSE"):
        _run(args)
        return
    for what in args.what:
        command = [sys.executable, __file__, what, "--model", args.model, "--data", args.data]
        command += ["--batch", str(args.batch), "--batches", str(args.batches)]
        command += ["--weights", args.weights] if args.weights else []
        environment = {**os.environ, "ONEDNN_VERBOSE": "profile_create"}
        told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        built, counts = 0, []
        for line in told.stdout.splitlines():
            built += "create:cache_miss" in line
            if line == _MARK:
                counts.append(built)
        shown = [n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500) if n <= len(counts)]
        print(f"{what}, batch {args.batch}: " + ", ".join(f"{counts[n - 1]} by {n}" for n in shown))


def _run(args: argparse.Namespace) -> None:
    (what,) = args.what
    model = load_model(args.model, args.weights) if args.weights else untrained_model(args.model)
    model = model.eval().to(torch.bfloat16)
    source = open_source(args.data, model, split="test", limit=512)
    images = source.batch(torch.arange(len(source))).images.to(torch.bfloat16)
    if what in shipped():
        method = agents.load(what)
    else:
        method = agents.parse_policy(what, len(model.blocks))
    fast, fresh = tokenenv.compress(model, method), fresh_batches(images, args.batch)
    with torch.inference_mode():
        for _ in range(args.batches):
            fast(next(fresh))
            print(_MARK, flush=True)


if __name__ == "__main__":
    run_script(main)
