"""``tokenenv compare``: its options, and the call of :func:`tokenenv.compare`."""

from __future__ import annotations

import argparse

from tokenenv.cli.options import (
    WHAT,
    Parser,
    add_dtype,
    add_model_options,
    add_trust,
    batches,
    positive,
    preprocessing,
)


def add_parser(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the parser of ``tokenenv compare`` with its options."""
    compare = commands.add_parser(
        "compare",
        help="evaluate and time many methods on the same images: tables and a Pareto picture",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Evaluate methods and runs on one model and the same images, then time them "
        "in turns.\nA bar separates the values of a sweep. Writes table.md, .csv, .json and .tex, "
        "classes.csv, pareto.png\nand report.html, a page for a browser.\n\nCtrl-C keeps the "
        "finished rows, and the same command continues with the rest. A later command\nwith the "
        "same --out may name further methods; finished rows are not evaluated again.",
        epilog="examples:\n  tokenenv compare 'tome:r=2|4|6|8' 'norm:keep=0.9|0.7|0.5'\n"
        "  tokenenv compare 'tome:r=4|8|12' 'cls-attention:keep=0.9|0.7,blocks=3/6/9|2/5/8' "
        "dora-deit_tiny\n      'dora-strict-deit_tiny:threshold=0.4|0.6' --data imagenet/val "
        "--limit 5000\n  tokenenv compare runs/dora-0 runs/dora-1 runs/dora-2 tome:r=8 --seeds\n"
        "  tokenenv compare 'my_methods.py:Halves:keep=0.7|0.5' tome:r=8",
    )
    compare.add_argument("what", metavar="WHAT", nargs="+", help=f"{WHAT}; key=1|2|3 is a sweep")
    add_model_options(compare)
    add_dtype(compare)
    compare.add_argument("--limit", type=positive, metavar="N", help="at most N images")
    compare.add_argument(
        "--batch",
        type=batches,
        default="1,64",
        metavar="N,N",
        help="batch sizes to time; default: 1,64",
    )
    compare.add_argument("--rounds", type=positive, default=5, metavar="N", help="default: 5")
    compare.add_argument(
        "--out", default="compare", metavar="DIR", help="folder to write; default: compare"
    )
    compare.add_argument(
        "--seeds",
        action="store_true",
        help="also summarise runs that differ in their seed alone: mean, standard deviation, "
        "interval of the mean",
    )
    compare.add_argument(
        "--published-cost",
        action="store_true",
        help="count the last block in full, as papers and 'evaluate' do (default: of it what the "
        "head reads, which is all that is computed)",
    )
    add_trust(compare)


def run(args: argparse.Namespace) -> int:
    """Run ``tokenenv compare``; returns the exit status."""
    from tokenenv.api.compare import compare
    from tokenenv.measure.comparison import TOLERATED

    comparison = compare(
        args.what,
        model=args.model,
        weights=args.weights,
        data=args.data,
        limit=args.limit,
        batch=args.batch,
        rounds=args.rounds,
        out=args.out,
        device=args.device,
        dtype=args.dtype,
        preprocessing=preprocessing(args),
        trust=args.trust,
        seeds=args.seeds,
        published_cost=args.published_cost,
    )
    if (exact := comparison.rows[1]).reference:
        print(f"  {exact.what}: {exact.saved:.1f} % saved without removing a token")
    for each in comparison.seeds:
        print(
            f"{each.what}, {len(each.rows)} seeds: top-1 {each.top1.mean:.2f} +- "
            f"{each.top1.sd:.2f} %, saved {each.saved.mean:.1f} +- {each.saved.sd:.1f} % "
            "(standard deviation)"
        )
    print(
        f"hypervolume, %: MACs saved when 0 to {TOLERATED:g} points of top-1 may be lost, "
        "averaged; top-1 gained over dense is added:"
    )
    for method, covered in comparison.covered().items():
        print(f"  {method:46}{covered:8.2f}")
    print(
        f"the tables are in {args.out}/table.md, .csv, .json and .tex, the picture in "
        f"{args.out}/pareto.png, all of it in {args.out}/report.html"
    )
    return 0
