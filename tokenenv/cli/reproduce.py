"""``tokenenv reproduce``: its options, and the call of :func:`tokenenv.reproduce`."""

from __future__ import annotations

import argparse

from tokenenv.cli.options import Parser, add_dtype, positive

PAPERS = ("rl4evit", "dora", "dora-prune", "ltm", "mstm")
TIERS = ("smoke", "small", "paper")


def add_parser(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the parser of ``tokenenv reproduce`` with its options."""
    reproduce = commands.add_parser(
        "reproduce",
        help="run a paper's protocol and write its table, the paper's numbers beside ours",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train what the paper trains, fine-tune where it does, set the baselines to "
        "the same accuracy\nor cost, evaluate, time, and write report.html, table.md and "
        "table.json. How long it will take is\nsaid first, from measured rates. Ctrl-C keeps "
        "finished rows, and the same command goes on, also\nwith more seeds, models and sets.",
        epilog="examples:\n  tokenenv reproduce rl4evit --out rl4evit\n"
        "  tokenenv reproduce dora --tier small --imagenet photographs --out dora\n"
        "  tokenenv reproduce dora-prune --tier paper --imagenet imagenet --imagenet-a imagenet-a "
        "\\\n      --imagenet-c imagenet-c --device cuda --dtype bfloat16 --out dora-prune",
    )
    reproduce.add_argument("paper", choices=PAPERS, metavar="PAPER", help=", ".join(PAPERS))
    reproduce.add_argument(
        "--tier", choices=TIERS, default="smoke",
        help="smoke: minutes, embedded images; small: hours, a folder of photographs; paper: "
        "ImageNet-1K; default: smoke",
    )  # fmt: skip
    reproduce.add_argument(
        "--imagenet", metavar="DIR", help="train/CLASS/IMAGE and val/CLASS/IMAGE"
    )
    reproduce.add_argument("--imagenet-a", metavar="DIR", help="CLASS/IMAGE")
    reproduce.add_argument("--imagenet-c", metavar="DIR", help="CORRUPTION/SEVERITY/CLASS/IMAGE")
    reproduce.add_argument(
        "--models", type=_names, default=[], metavar="NAME,NAME", help="default: the tier's"
    )
    reproduce.add_argument(
        "--weights", metavar="FILE", help="a file, or a folder with MODEL.safetensors"
    )
    reproduce.add_argument("--seeds", type=positive, metavar="N", help="default: the tier's, 3")
    reproduce.add_argument("--device", default="cpu", metavar="D", help="cpu, cuda ...")
    add_dtype(reproduce, "precision of measuring")
    reproduce.add_argument("--out", required=True, metavar="DIR", help="folder to write")


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def run(args: argparse.Namespace) -> int:
    """Run ``tokenenv reproduce``; returns the exit status."""
    from tokenenv.api.reproduce import reproduce

    done = reproduce(
        args.paper,
        out=args.out,
        tier=args.tier,
        imagenet=args.imagenet,
        imagenet_a=args.imagenet_a,
        imagenet_c=args.imagenet_c,
        models=args.models,
        weights=args.weights,
        seeds=args.seeds,
        device=args.device,
        dtype=args.dtype,
    )
    print(f"\n{done.as_markdown()}")
    print(f"the table is in {args.out}/table.md, .json and report.html")
    return 0
