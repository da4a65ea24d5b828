"""``tokenenv watch``: its options, and the call of :func:`tokenenv.watch`."""

from __future__ import annotations

import argparse

from tokenenv.cli.options import (
    WHAT,
    Parser,
    add_model_options,
    add_trust,
    positions,
    preprocessing,
    writable_file,
)
from tokenenv.paths import as_path


def add_parser(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the parser of ``tokenenv watch`` with its options."""
    watch = commands.add_parser(
        "watch",
        help="an animation of which tokens a method removes, decision by decision",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Write an animated GIF with a frame before the first decision and one after "
        "each, for every image.",
        epilog="example:\n  tokenenv watch runs/rl4evit-0 --index 3,5 --out episode.gif",
    )
    watch.add_argument("what", metavar="WHAT", help=WHAT)
    watch.add_argument(
        "--index",
        type=positions,
        metavar="I,J",
        help="positions of the images in the data, from 0 (default: three spread over the data)",
    )
    add_model_options(watch)
    watch.add_argument("--out", required=True, metavar="FILE", help="the GIF to write")
    add_trust(watch)


def run(args: argparse.Namespace) -> int:
    """Run ``tokenenv watch``; returns the exit status."""
    from tokenenv.api.watch import watch
    from tokenenv.game.animation import check_gif

    check_gif(as_path(args.out, "--out"))
    with writable_file(args.out, "--out"):
        found = watch(
            args.what,
            index=args.index,
            model=args.model,
            weights=args.weights,
            data=args.data,
            device=args.device,
            preprocessing=preprocessing(args),
            trust=args.trust,
        )
        found.save(args.out)
        frames = sum(map(len, found.episodes))
        print(
            f"{found.what} on {found.model}: {frames} frames of {len(found.episodes)} images are "
            f"in {args.out}"
        )
    return 0
