"""``tokenenv tune``: its options, and the call of :func:`tokenenv.tune`."""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenenv.cli.options import (
    WHAT,
    Parser,
    add_model_options,
    add_trust,
    positive,
    preprocessing,
    seed,
    writable_file,
)
from tokenenv.errors import UserError


def add_parser(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the parser of ``tokenenv tune`` with its options."""
    tune = commands.add_parser(
        "tune",
        help="find the fastest model within an accuracy budget, on this machine",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Try every method at some settings, schedules found by predicted time, shipped "
        "policies, smaller\nimages and your own methods; time the best on fresh batches beside the "
        "dense model, and verify\nthem on images that took no part in choosing. Writes the "
        "recommended model, which\ntokenenv.load_compressed reads, and tune.md, tune.json and "
        "tune.png.\n\nCtrl-C keeps what is known, and the same command goes on.",
        epilog="examples:\n  tokenenv tune --budget 2 --out fast\n"
        "  tokenenv tune --model deit_tiny_patch16_224 --data photographs --budget 0.5 --batch 64 "
        "--out fast\n  tokenenv tune --model deit_tiny_patch16_224 --data photographs --train 15m "
        "--out fast\n  tokenenv tune --data images --unlabelled --budget 3 --method "
        "my_methods.py:MergeAlike --out fast",
    )
    add_model_options(tune)
    tune.add_argument(
        "--budget", type=float, default=0.5, metavar="P",
        help="top-1 that may be lost, percentage points; default: 0.5",
    )  # fmt: skip
    tune.add_argument("--batch", type=positive, default=1, metavar="N", help="default: 1")
    tune.add_argument(
        "--method", dest="methods", action="append", default=[], metavar="WHAT",
        help=f"a candidate of your own, repeatable: {WHAT}",
    )  # fmt: skip
    tune.add_argument(
        "--only-methods", action="store_true", help="try what --method names and nothing else"
    )
    tune.add_argument(
        "--train", metavar="TIME", help="train a policy for this model and clock: 90s, 15m, 1h"
    )
    tune.add_argument(
        "--unlabelled", action="store_true",
        help="the images of --data have no labels: what the dense model says counts as right",
    )  # fmt: skip
    tune.add_argument(
        "--compile", action="store_true",
        help="time what torch.compile makes of the dense model and of the best candidates, too",
    )  # fmt: skip
    tune.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"),
        help="precision of the candidates (default: float32, or bfloat16 where that is faster and "
        "within the budget)",
    )  # fmt: skip
    tune.add_argument(
        "--runtime", choices=("torch", "onnx", "auto"), default="torch",
        help="onnx: the best methods and the dense model run in ONNX Runtime (pip install "
        "tokenenv[export]); auto: in whichever is faster, or both; default: torch",
    )  # fmt: skip
    tune.add_argument("--limit", type=positive, metavar="N", help="at most N images")
    tune.add_argument("--seed", type=seed, default=0, metavar="S", help="default: 0")
    tune.add_argument(
        "--out", metavar="DIR", required=True, help="folder of the model and the tables"
    )
    tune.add_argument("--export", metavar="FILE", help="write the recommended model as ONNX there")
    add_trust(tune)


def run(args: argparse.Namespace) -> int:
    """Run ``tokenenv tune``; returns the exit status."""
    from tokenenv.api.tune import tune
    from tokenenv.api.tune_inputs import seconds_of

    if args.export and Path(args.export).resolve() == Path(args.out).resolve():
        raise UserError("--out is a folder and --export a file: give them different names")
    with writable_file(args.export, "--export"):
        tune(
            args.model,
            weights=args.weights,
            data=args.data,
            budget=args.budget,
            batch=args.batch,
            methods=args.methods,
            only_methods=args.only_methods,
            train=0.0 if args.train is None else seconds_of(args.train),
            unlabelled=args.unlabelled,
            compile=args.compile,
            limit=args.limit,
            seed=args.seed,
            out=args.out,
            device=args.device,
            dtype=args.dtype,
            preprocessing=preprocessing(args),
            trust=args.trust,
            runtime=args.runtime,
            export=args.export,
        )
    return 0
