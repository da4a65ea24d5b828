"""Compile a reduced model ahead of time by AOTInductor, and time it beside PyTorch, at batch 1.

    python benchmarks/aot_inductor.py dora-deit_tiny --model deit_tiny_patch16_224 \
        --weights deit.safetensors --data photographs --dtype bfloat16

One graph holds all decisions, also where the number of tokens depends on the image. Two things of
torch 2.14 are worked around here. Inductor has to know that more than three tokens are left after
a decision; an image of which fewer are left ends in an error. And the fall-back that AOTInductor
calls for ``index_add`` in bfloat16 fails, so that it is computed in float32. For the first reason,
and because a package is native code that loading it executes, ``tokenenv compress`` doesn't write
one.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

import tokenenv
from tokenenv.cli.options import positive
from tokenenv.data import open_source
from tokenenv.errors import run_script
from tokenenv.measure.speed import fresh_batches, in_turns
from tokenenv.vit import packing

LEAST = 4
"""Fewest tokens after a decision."""

compact_one, index_add = packing.compact_one, Tensor.index_add


def compact_checked(tokens: Any) -> Any:
    """``compact_one`` that promises Inductor the least number of tokens."""
    made = compact_one(tokens)
    torch._check(made.x.shape[1] >= LEAST)
    return made


def index_add_float32(self: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """``index_add`` with its sum in float32."""
    return index_add(self.float(), dim, index, source.float()).to(self.dtype)


def packaged(model: torch.nn.Module, image: Tensor) -> Any:
    """The model compiled for one image at a time, loaded."""
    begun = time.perf_counter()
    with (
        torch.no_grad(),
        patch.object(packing, "compact_one", compact_checked),
        patch.object(Tensor, "index_add", index_add_float32),
    ):
        program = torch.export.export(model, (image,), strict=False)
    traced = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(Path(place, "model.pt2"))
        )
        took, size = time.perf_counter() - traced, Path(path).stat().st_size / 1e6
        print(f"traced in {traced - begun:.0f} s, compiled in {took:.0f} s, {size:.1f} MB")
        return torch._inductor.aoti_load_package(path)


def main() -> None:
    """Print the median time of each form, and the ratio to the dense model's in the same round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what")
    parser.add_argument("--model", required=True)
    parser.add_argument("--weights")
    parser.add_argument("--data", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--rounds", type=positive, default=11)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    fast = tokenenv.compress(args.model, args.what, weights=args.weights, dtype=args.dtype)
    source = open_source(args.data, fast.model, split="test", limit=64)
    images = source.batch(torch.arange(len(source))).images.to(fast.backbone.dtype)
    run = packaged(fast, images[:1])
    runs = {
        "dense": fast.model,
        "dense, compiled": torch.compile(fast.model, dynamic=False),
        "reduced": fast,
        "reduced, ahead of time": run,
    }
    fresh = fresh_batches(images, 1)
    with torch.inference_mode():
        same = sum(int(fast(x[None]).argmax() == run(x[None]).argmax()) for x in images)
        for form in runs.values():
            form(next(fresh))
        took = in_turns(runs, fresh, args.rounds, 16, torch.device("cpu"))
    for name, seconds in took.items():
        low, middle, high = np.quantile(took["dense"] / seconds, [0.25, 0.5, 0.75])
        print(
            f"{name:22} {1e3 * np.median(seconds):6.2f} ms, {middle:.2f} x ({low:.2f}-{high:.2f})"
        )
    print(f"the same prediction as in PyTorch: {same} of {len(images)} images")


if __name__ == "__main__":
    run_script(main)
