"""Predicted against measured time: how far the latency table is from the clock.

    python benchmarks/latency_table.py --model deit_tiny_patch16_224 tome:r=8 dora-deit_tiny

Each method runs on fresh random images, or on those of --data, in turns with the dense model.
Printed are milliseconds per image: the median of the clock, the mean that the table predicts for
the same token counts, and the error. The table comes from the cache if it is there.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from tokenenv.api.opening import open_candidates
from tokenenv.data import open_source
from tokenenv.errors import run_script
from tokenenv.game.latency import TimeCost, measure_decisions, open_table
from tokenenv.game.policy import Method, play
from tokenenv.game.timing import Nothing
from tokenenv.measure.opening import named_model
from tokenenv.vit.backbone import Backbone


def main() -> None:
    """Print a line for each precision, batch size and method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("whats", nargs="+")
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--weights", default=None)
    parser.add_argument("--data", default=None)
    parser.add_argument("--batch", default="1,8,64")
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--images", type=int, default=256, help="images timed per row, at least")
    args = parser.parse_args()
    print(f"{'dtype':9}{'batch':>6}  {'method':28}{'clock ms':>9}{'table ms':>9}{'error':>8}")
    for dtype in args.dtype.split(","):
        opened = open_candidates(
            args.whats,
            named_model(args.model, args.weights, "cpu", dtype, None),
            data=args.data,
            images=False,
        )
        backbone = opened.dense
        assert isinstance(backbone, Backbone)
        methods = {"dense": Nothing()} | {c.what: c.method for c in opened.candidates}
        for batch in map(int, args.batch.split(",")):
            pool = images(backbone, args.data, max(args.images, 3 * batch))
            for what, (clock, table) in compare(backbone, methods, pool, batch).items():
                error = 100 * (table / clock - 1)
                row = f"{dtype:9}{batch:6}  {what:28}{1e3 * clock:9.3f}{1e3 * table:9.3f}"
                print(f"{row}{error:+7.1f}%", flush=True)


def images(backbone: Backbone, data: str | None, count: int) -> torch.Tensor:
    """``(count, C, H, W)`` images of a folder, evenly spread over it, or random ones."""
    if data is None:
        drawn = torch.randn(
            count, *backbone.image_shape, generator=torch.Generator().manual_seed(1)
        )
    else:
        source = open_source(data, backbone.model, split="test")
        drawn = source.batch(torch.arange(len(source))[:: max(1, len(source) // count)]).images
    return drawn.to(backbone.dtype)


@torch.inference_mode()
def compare(
    backbone: Backbone, methods: dict[str, Method], pool: torch.Tensor, batch: int
) -> dict[str, tuple[float, float]]:
    """Median measured and mean predicted seconds per image of each method."""
    table = open_table(backbone, batch)
    costs = {
        what: TimeCost(
            backbone,
            table,
            measure_decisions(backbone, table, method) if method.reduction.blocks else {},
        )
        for what, method in methods.items()
    }
    took: dict[str, list[float]] = {what: [] for what in methods}
    told: dict[str, list[float]] = {what: [] for what in methods}
    for turn, part in enumerate(pool[: len(pool) // batch * batch].split(batch)):
        whats = list(methods)
        first = turn % len(whats)
        for what in whats[first:] + whats[:first]:
            start = time.perf_counter()
            episode = play(backbone, methods[what], part, only_logits=True)
            took[what].append((time.perf_counter() - start) / batch)
            told[what].append(float(costs[what].of(episode, methods[what]).mean()))
    return {what: (float(np.median(took[what])), float(np.mean(told[what]))) for what in methods}


if __name__ == "__main__":
    run_script(main)
