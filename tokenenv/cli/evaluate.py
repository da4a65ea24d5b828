"""``tokenenv evaluate``: its options, and the call of :func:`tokenenv.evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenenv.cli.options import (
    WHAT,
    Parser,
    add_dtype,
    add_model_options,
    add_trust,
    positive,
    preprocessing,
    writable_file,
)


def add_parser(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the parser of ``tokenenv evaluate`` with its options."""
    evaluate = commands.add_parser(
        "evaluate",
        help="accuracy, multiply-adds and speed of a method beside the dense model",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Run every image through the dense model and through a method.",
        epilog="examples:\n  tokenenv evaluate runs/rl4evit-0\n"
        "  tokenenv evaluate cls-attention:keep=0.7,blocks=3/6/9 --model deit_tiny_patch16_224 "
        "--data val --json r.json",
    )
    evaluate.add_argument("what", metavar="WHAT", help=WHAT)
    add_model_options(evaluate)
    add_dtype(evaluate)
    evaluate.add_argument("--limit", type=positive, metavar="N", help="at most N images")
    evaluate.add_argument("--batch", type=positive, default=64, metavar="N", help="default: 64")
    evaluate.add_argument(
        "--restrict",
        action="store_true",
        help="predict only among the classes of --data (the ImageNet-A and -R protocol)",
    )
    evaluate.add_argument(
        "--time-batch",
        type=positive,
        metavar="N",
        help="predict the time at batch size N, too, from a table of this machine",
    )
    evaluate.add_argument(
        "--json", metavar="FILE", help="write the numbers and every image's predictions there"
    )
    add_trust(evaluate)


def run(args: argparse.Namespace) -> int:
    """Run ``tokenenv evaluate``; returns the exit status."""
    from tokenenv.api.evaluate import evaluate
    from tokenenv.measure.printing import print_parameters, print_result, report_skipped
    from tokenenv.storage import write_json

    with writable_file(args.json):  # before minutes of work
        found = evaluate(
            args.what,
            model=args.model,
            weights=args.weights,
            data=args.data,
            limit=args.limit,
            batch=args.batch,
            restrict=args.restrict,
            device=args.device,
            dtype=args.dtype,
            time_batch=args.time_batch,
            preprocessing=preprocessing(args),
            trust=args.trust,
        )
        dtype = "" if args.dtype == "float32" else f" in {args.dtype}"
        print(f"{found.what} on {found.model}{dtype}")
        report_skipped(found.source)
        print_result(found.source, found.evaluation, found.frozen)
        if found.parameters != found.parameters_dense:
            print_parameters(found.parameters, found.parameters_dense)
        if args.json:
            write_json(Path(args.json), found.to_dict())
            print(f"every prediction is in {args.json}")
    return 0
