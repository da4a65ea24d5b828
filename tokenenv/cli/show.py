"""``tokenenv show``: its options, and the call of :func:`tokenenv.show`."""

from __future__ import annotations

import argparse

from tokenenv.cli.options import (
    WHAT,
    Parser,
    add_model_options,
    add_trust,
    preprocessing,
    writable_file,
)
from tokenenv.paths import as_path


def add_parser(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the parser of ``tokenenv show`` with its options."""
    show = commands.add_parser(
        "show",
        help="what a method does to your images, block by block: a picture, a GIF or a page",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Show which tokens of some images leave or merge in each block, the classes "
        "that the dense model\nand the reduced one see, and how many tokens, multiply-adds and "
        "milliseconds are left.\nThe images need no labels.",
        epilog="examples:\n  tokenenv show dora-deit_tiny photo.jpg --out shown.png\n"
        "  tokenenv show tome:r=8 a.jpg b.png --against evit:keep=0.7 --model "
        "deit_tiny_patch16_224 --out shown.html",
    )
    show.add_argument("what", metavar="WHAT", help=WHAT)
    show.add_argument("images", metavar="IMAGE", nargs="+", help="image files of any size and mode")
    show.add_argument("--against", metavar="WHAT2", help="a second method to show beside it")
    add_model_options(show, images=False)
    show.add_argument(
        "--out",
        required=True,
        metavar="FILE",
        help="the file to write: .png, .gif, or .html for a page with a slider over the blocks",
    )
    add_trust(show)


def run(args: argparse.Namespace) -> int:
    """Run ``tokenenv show``; returns the exit status."""
    from tokenenv.api.show import check_suffix, show

    check_suffix(as_path(args.out, "--out"))
    with writable_file(args.out, "--out"):
        found = show(
            args.what,
            args.images,
            against=args.against,
            model=args.model,
            weights=args.weights,
            device=args.device,
            preprocessing=preprocessing(args),
            trust=args.trust,
        )
        found.save(args.out)
        for line in found.lines():
            print(line)
        print(f"{args.out} shows it")
    return 0
