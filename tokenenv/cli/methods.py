"""``tokenenv methods``: every WHAT that needs no training, and how it is used."""

from __future__ import annotations

import argparse

from tokenenv.cli.options import Parser


def add_parser(commands: argparse._SubParsersAction[Parser]) -> None:
    """The command's options."""
    commands.add_parser(
        "methods",
        help="what WHAT can be: published methods, heuristics, shipped policies",
        description="List every method that evaluate, bench, compare and compress take by name.",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from agents.policies import shipped
    from agents.policies.words import usages

    print("methods without training:")
    for name, usage in usages().items():
        print(f"  {usage}" if usage.startswith(name) else f"  {name}: {usage}")
    print("policies that come with the package, each with :threshold=0.6 if wanted:")
    for name in shipped():
        print(f"  {name}")
    print(
        "and the folder of a run, of an LTM model or of a compressed one; of your own:\n"
        "module:Name:key=value or path/to/file.py:Name:key=value"
    )
    return 0
