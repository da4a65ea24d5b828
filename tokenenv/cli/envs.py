"""``tokenenv envs``: the registered environments."""

from __future__ import annotations

import argparse

from tokenenv.cli.options import Parser


def add_parser(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the parser of ``tokenenv envs`` with its options."""
    commands.add_parser(
        "envs",
        help="the registered environments, one line each",
        description="List the environments that gymnasium and PettingZoo know after "
        "'import tokenenv', one line each.",
    )


def run(args: argparse.Namespace) -> int:
    """Run ``tokenenv envs``; returns the exit status."""
    from tokenenv.envs.ids import listing

    print(listing())
    return 0
