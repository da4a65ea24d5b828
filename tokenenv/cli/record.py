"""``tokenenv record``: its options, and the call of :func:`tokenenv.record`."""

from __future__ import annotations

import argparse

from tokenenv.cli.options import WHAT, Parser, add_model_options, add_trust, positive, seed


def add_parser(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the parser of ``tokenenv record`` with its options."""
    record = commands.add_parser(
        "record",
        help="a policy's episodes as a Minari data set, for offline RL",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Write a policy's episodes in the Gymnasium environment of its game to a data "
        "set that Minari reads (extra 'minari').",
        epilog="example:\n  tokenenv record tome:r=8 --minari tokenenv/digits-tome-v0",
    )
    record.add_argument("what", metavar="WHAT", help=WHAT)
    record.add_argument(
        "--minari",
        required=True,
        metavar="NAME",
        help="name of the data set, such as tokenenv/digits-tome-v0; it is written where Minari "
        "keeps them ($MINARI_DATASETS_PATH, by default ~/.minari/datasets)",
    )
    record.add_argument(
        "--episodes", type=positive, default=100, metavar="N", help="one image each (default: 100)"
    )
    record.add_argument(
        "--seed", type=seed, default=0, metavar="S", help="of the first episode (default: 0)"
    )
    record.add_argument(
        "--split",
        choices=("train", "validation", "test"),
        default="train",
        help="which part of the images, if they have parts (default: train)",
    )
    add_model_options(record, preprocessing=False)
    add_trust(record)


def run(args: argparse.Namespace) -> int:
    """Run ``tokenenv record``; returns the exit status."""
    from tokenenv.api.record import record

    found = record(
        args.what,
        minari=args.minari,
        episodes=args.episodes,
        seed=args.seed,
        split=args.split,
        model=args.model,
        weights=args.weights,
        data=args.data,
        device=args.device,
        trust=args.trust,
    )
    print(
        f"{found.what} in {found.environment}: {found.episodes} episodes, {found.steps} steps, "
        f"mean return {found.mean_return:.4g}, {100 * found.correct:.2f} % correct, are in "
        f"{found.folder}"
    )
    return 0
