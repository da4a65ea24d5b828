"""The command line: one module for each command. Parsing imports nothing heavy."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from types import ModuleType

from tokenenv._version import __version__
from tokenenv.cli import bench, compare, compress, envs, evaluate, methods, suite, train
from tokenenv.cli.options import Parser
from tokenenv.errors import UserError

COMMANDS: dict[str, ModuleType] = {
    "train": train,
    "evaluate": evaluate,
    "compress": compress,
    "bench": bench,
    "compare": compare,
    "suite": suite,
    "methods": methods,
    "envs": envs,
}
"""Each has ``add_parser``, which adds its options, and ``run``, which gives its exit status."""


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = Parser(
        prog="tokenenv",
        description="Vision Transformer inference as a Markov game: agents decide which tokens "
        "go on.",
        epilog="exit status: 0 done, 2 a mistake in what was asked for, 130 stopped by Ctrl-C",
    )
    parser.add_argument("--version", action="version", version=f"tokenenv {__version__}")
    parser.add_argument(
        "--traceback",
        action="store_true",
        help="show where a mistake comes from, such as a line of your own file; before COMMAND",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS.values():
        command.add_parser(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 on success, 2 for a user's mistake, 130 after Ctrl-C, 141 if nobody reads what it prints.
    """
    args = build_parser().parse_args(argv)
    try:
        _check_torchrun(args.command)
        status: int = COMMANDS[args.command].run(args)
        sys.stdout.flush()
        return status
    except UserError as error:
        if args.traceback:
            traceback.print_exception(error)
        print(f"tokenenv: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print("; ".join(["tokenenv: interrupted", *interrupt.args]), file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read the output, such as head, has gone. Python writes what is left at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _check_torchrun(command: str) -> None:
    """Refuse to do in several processes what is one's work."""
    count = os.environ.get("WORLD_SIZE", "1")
    if command == "train" or count == "1":
        return
    if os.environ.get("RANK", "0") != "0":
        raise SystemExit(2)  # the first process says why
    raise UserError(
        f"torchrun started {count} processes (WORLD_SIZE), and only 'tokenenv train' shares its "
        f"work: start 'tokenenv {command}' without it"
    )
