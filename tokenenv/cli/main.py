"""The entry point of the command line. Parsing imports neither torch nor timm."""

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
"""Modules by command; each has ``add_parser(commands)`` and ``run(args)``, the exit status."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands with their options."""
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
        help="also print the traceback of a mistake, such as one in your own file; give it before "
        "COMMAND",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS.values():
        command.add_parser(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 on success, 2 for a user's mistake, 130 after Ctrl-C, 141 if the output pipe was closed.
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
        # The reader, such as head, closed the pipe. Python would write the rest when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _check_torchrun(command: str) -> None:
    """Refuse to run a command other than ``train`` in several processes."""
    count = os.environ.get("WORLD_SIZE", "1")
    if command == "train" or count == "1":
        return
    if os.environ.get("RANK", "0") != "0":
        raise SystemExit(2)  # the first process prints the reason
    raise UserError(
        f"torchrun started {count} processes (WORLD_SIZE), and only 'tokenenv train' shares its "
        f"work: start 'tokenenv {command}' without it"
    )
