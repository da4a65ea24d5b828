"""The entry point of the command line. Parsing imports neither torch nor timm."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from types import ModuleType

from tokenenv._version import __version__
from tokenenv.cli import (
    bench,
    compare,
    compress,
    envs,
    evaluate,
    explore,
    methods,
    record,
    reproduce,
    show,
    suite,
    train,
    tune,
    watch,
)
from tokenenv.cli.options import Parser
from tokenenv.cli.streams import leave_stream, sturdy_streams
from tokenenv.errors import UserError

COMMANDS: dict[str, ModuleType] = {
    "train": train,
    "evaluate": evaluate,
    "compress": compress,
    "bench": bench,
    "compare": compare,
    "show": show,
    "explore": explore,
    "tune": tune,
    "watch": watch,
    "record": record,
    "reproduce": reproduce,
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
        0 on success, 2 for a user's mistake or a file that can't be read or written, 130 after
        Ctrl-C, 141 if the output pipe was closed.
    """
    with sturdy_streams() as out:
        status = _run(build_parser().parse_args(argv))
        if out.lost is not None and status != 141:
            print(
                f"tokenenv: standard output can't be written to ({out.lost.strerror}): files that "
                "were asked for are complete, give the output another place",
                file=sys.stderr,
            )
            return status or 2
        return status


def _run(args: argparse.Namespace) -> int:
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
        leave_stream(sys.stdout)  # the reader, such as head, closed the pipe
        return 141
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        print(
            f"tokenenv: the memory is too small ({reason or type(error).__name__}): give a smaller "
            "batch or fewer images",
            file=sys.stderr,
        )
        return 2
    except OSError as error:
        if args.traceback:
            traceback.print_exception(error)
        where = f"'{error.filename}'" if error.filename else "a file"
        print(
            f"tokenenv: {where} can't be used ({error.strerror or error}): mend it, or give "
            "another; tokenenv --traceback shows where it was needed",
            file=sys.stderr,
        )
        return 2


def _out_of_memory(error: Exception) -> bool:
    """Whether an error is Python's or torch's for too little memory; torch's has no class of it."""
    words = ("can't allocate memory", "out of memory", "not enough memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


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
