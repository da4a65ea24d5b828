"""``tokenenv methods``: the methods without training and the shipped policies."""

from __future__ import annotations

import argparse

from tokenenv.cli.options import Parser


def add_parser(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the parser of ``tokenenv methods`` with its options."""
    commands.add_parser(
        "methods",
        help="list the methods that WHAT can name, and the shipped policies",
        description="List every method that evaluate, bench, compare and compress take by name.",
    )


def run(args: argparse.Namespace) -> int:
    """Run ``tokenenv methods``; returns the exit status."""
    from agents.policies import shipped
    from agents.policies.words import usages

    print("methods without training:")
    for name, usage in usages().items():
        print(f"  {usage}" if usage.startswith(name) else f"  {name}: {usage}")
    print("shipped policies, each also with another threshold, such as :threshold=0.6:")
    for name in shipped():
        print(f"  {name}")
    print(
        "folders: of a run, of an LTM model or of a compressed model\n"
        "your own: module:Name:key=value or path/to/file.py:Name:key=value"
    )
    return 0
