"""``tokenenv explore``: its options, and the call of :func:`tokenenv.explore`."""

from __future__ import annotations

import argparse

from tokenenv.cli.options import (
    WHAT,
    Parser,
    add_model_options,
    add_trust,
    batches,
    positive,
    preprocessing,
    writable_file,
)
from tokenenv.paths import as_path


def add_parser(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the parser of ``tokenenv explore`` with its options."""
    explore = commands.add_parser(
        "explore",
        help="a page for a browser: images block by block, accuracy against cost, classes",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Compare methods on the same images and write a page that shows what they do. "
        "The page is one file,\nwhich needs no network: open it, send it, or put it on a static "
        "host.",
        epilog="example:\n  tokenenv explore dora-deit_tiny 'tome:r=4|8' --data imagenet/val "
        "--out page",
    )
    explore.add_argument("what", metavar="WHAT", nargs="+", help=f"{WHAT}; key=1|2|3 is a sweep")
    add_model_options(explore)
    explore.add_argument(
        "--images", type=positive, default=60, metavar="N", help="images in the page; default: 60"
    )
    explore.add_argument(
        "--limit",
        type=positive,
        default=600,
        metavar="N",
        help="images to measure accuracy on, at most; default: 600",
    )
    explore.add_argument(
        "--batch", type=batches, default="1", metavar="N,N", help="batch sizes to time; default: 1"
    )
    explore.add_argument("--rounds", type=positive, default=3, metavar="N", help="default: 3")
    explore.add_argument(
        "--out", default="page", metavar="DIR", help="folder for index.html; default: page"
    )
    add_trust(explore)


def run(args: argparse.Namespace) -> int:
    """Run ``tokenenv explore``; returns the exit status."""
    from tokenenv.api.explore import INDEX, explore, report_size

    out = as_path(args.out, "--out")
    with writable_file(str(out / INDEX), "--out"):
        found = explore(
            args.what,
            model=args.model,
            weights=args.weights,
            data=args.data,
            images=args.images,
            limit=args.limit,
            batch=args.batch,
            rounds=args.rounds,
            device=args.device,
            preprocessing=preprocessing(args),
            trust=args.trust,
        )
        report_size(found.save(out), out, len(found.shown))
    return 0
