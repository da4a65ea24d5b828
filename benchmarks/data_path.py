"""Training's data path: time to the first update, memory, cost per update, by size of the set.

    python benchmarks/data_path.py --data imagenet_sample

For each of ``--sizes`` a folder of hard links repeats the images of ``--data``, and a process of
its own runs ``tokenenv train rl4evit`` on it. Printed are the seconds from the call of ``train`` to
its first update (in brackets the process's own seconds of computation, for a machine that others
use too), what of that went into opening the set, the largest resident memory, and the median
seconds of an update. ``--held`` images are held back and judged before the first update.

Then updates are timed in turns on images already decoded, with the next batch decoded in the
background, and with every batch decoded when it is asked for; the first is the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from tokenenv.cli.options import batches, positive
from tokenenv.errors import UserError, run_script

MIB = 2**20


def repeated(data: Path, root: Path, size: int) -> Path:
    """A folder of ``size`` hard links to copies of the images of ``data``, spread over classes."""
    for folder in sorted(p for p in data.iterdir() if p.is_dir()):
        (root / folder.name).mkdir(parents=True)
    files = sorted(p for p in data.glob("*/*") if p.is_file())
    if not files:
        raise UserError(f"'{data}' holds no CLASS/IMAGE: give a folder that does")
    own = []
    for number, file in enumerate(files[:size]):
        own.append(root / file.parent.name / f"0-{number}{file.suffix}")
        own[-1].write_bytes(file.read_bytes())
    for number in range(len(own), size):
        first = own[number % len(own)]
        os.link(first, first.with_name(f"{number // len(own)}-{first.name[2:]}"))
    return root


def measure_training(args: argparse.Namespace) -> dict[str, float]:
    """Train on a folder in this process."""
    from agents.learners.ppo import PPO
    from agents.training import train
    from agents.training.request import Request

    starts, computed, opened = list[float](), list[float](), list[float]()
    update, images = PPO.update, Request.training_images

    def timed(self: Any) -> dict[str, float]:
        starts.append(time.perf_counter())
        computed.append(time.process_time())
        return update(self)

    def opening(self: Any, backbone: Any) -> Any:
        begin = time.perf_counter()
        found = images(self, backbone)
        opened.append(time.perf_counter() - begin)
        return found

    PPO.update, Request.training_images = timed, opening  # type: ignore[method-assign]
    begin, own = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as place:
        train(
            "rl4evit", model=args.model, weights=args.weights, data=args.one,
            out=Path(place, "run"),
            updates=args.updates, evaluate_every=args.updates, batch=args.batch, calibrate=0,
            held_most=args.held,
        )  # fmt: skip
    return {
        "first": starts[0] - begin,
        "first_own": computed[0] - own,
        "opening": opened[0],
        "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "update": median(b - a for a, b in pairwise(starts)),
        "update_own": median(b - a for a, b in pairwise(computed)),
    }


def measure_overlap(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Median seconds of an update in three ways of reading, in turns."""
    import torch

    from agents.training.request import make_request
    from agents.workers import ALONE
    from tokenenv.data import pixels

    def learner(cache: int) -> Any:
        pixels.CACHE_BYTES = cache
        request = make_request(
            "rl4evit", model=args.model, weights=args.weights, data=str(folder), batch=args.batch,
            held_most=args.held,
        )  # fmt: skip
        config: Any = request.config
        with tempfile.TemporaryDirectory() as place:
            return config.training(request, ALONE, Path(place)).trainer.learner

    ways = {
        "decoded before": learner(2**33),
        "decoded ahead": learner(0),
        "when asked for": learner(0),
    }
    ready = ways["decoded before"].arena.source
    ready.batch(torch.arange(len(ready)))
    ways["when asked for"].arena.source._store.expect = lambda positions: None
    took: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(args.rounds + 1):
        for name, each in ways.items():
            begin = time.perf_counter()
            each.update()
            if turn:
                took[name].append(time.perf_counter() - begin)
    return {name: median(values) for name, values in took.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="a folder of CLASS/IMAGE to repeat")
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--weights", default="random", help="a file; default: random weights")
    parser.add_argument("--sizes", type=batches, default="10000,1280000", metavar="N,N")
    parser.add_argument("--updates", type=positive, default=50)
    parser.add_argument("--batch", type=positive, default=64, help="rollouts; 4 for each image")
    parser.add_argument("--held", type=positive, default=1000)
    parser.add_argument("--rounds", type=int, default=15, help="of the last table; 0: none")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure_training(args)))
        return
    if args.data is None:
        raise UserError("give --data DIR")
    print(f"{'images':>9}{'first update, s':>22}{'opening, s':>12}{'MiB':>8}{'update, s':>18}")
    with tempfile.TemporaryDirectory() as place:
        for size in args.sizes:
            folder = repeated(args.data, Path(place, str(size)), size)
            options = [f"--{name}={getattr(args, name)}" for name in ("model", "weights", "updates",
                       "batch", "held")]  # fmt: skip
            done = subprocess.run(
                [sys.executable, __file__, "--one", str(folder), *options],
                stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            r = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{size:9}{r['first']:12.1f} [{r['first_own']:6.1f}]{r['opening']:12.1f}"
                f"{r['rss']:8.0f}{r['update']:9.3f} [{r['update_own']:5.3f}]",
                flush=True,
            )
        if args.rounds:
            small = repeated(args.data, Path(place, "small"), min(min(args.sizes), 1000))
            for name, seconds in measure_overlap(args, small).items():
                print(f"{name:16}{seconds:9.3f} s per update")


if __name__ == "__main__":
    run_script(main)
