"""``tokenenv bench``: its options, the call of :func:`tokenenv.bench`, its table."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from tokenenv.cli.options import (
    WHAT,
    Parser,
    add_execution,
    add_model_options,
    add_trust,
    batches,
    positive,
    preprocessing,
    writable_file,
)
from tokenenv.errors import UserError

if TYPE_CHECKING:
    from tokenenv.api.bench import Speeds
    from tokenenv.measure.speed import Speed


def add_parser(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the parser of ``tokenenv bench`` with its options."""
    bench = commands.add_parser(
        "bench",
        help="speed-up of methods over the dense model, and the limit that token counts set",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Time the dense model and methods in turns, in one process, each pass on a "
        "fresh batch. Speed-ups\nare over the fastest form of the dense model. 'sliced' is the "
        "speed-up of the dense model cut to\nthe method's token counts without deciding anything: "
        "the limit. 'share' is the method's part of\nit. The same model on smaller images stands "
        "beside. Images are those of --data, else the digits\nfor an embedded model and random "
        "ones for others.",
        epilog="examples:\n  tokenenv bench tome:r=3 random:keep=0.5..0.9\n"
        "  tokenenv bench tome:r=13 random:keep=0.5..0.9,blocks=3/6/9 --model "
        "deit_small_patch16_224 --weights random --batch 1,64 --json speed.json --out speed.png",
    )
    bench.add_argument("what", metavar="WHAT", nargs="+", help=WHAT)
    add_model_options(bench)
    bench.add_argument(
        "--dtype", type=_names, metavar="D,D",
        help="float32, bfloat16, float16 (default: float32, and bfloat16 where that is faster)",
    )  # fmt: skip
    bench.add_argument(
        "--batch", type=batches, default="1,8,64", metavar="N,N", help="default: 1,8,64"
    )
    bench.add_argument("--threads", type=positive, metavar="N", help="default: torch's choice")
    bench.add_argument("--rounds", type=positive, default=7, metavar="N", help="default: 7")
    add_execution(bench)
    bench.add_argument(
        "--compile",
        choices=("none", "dense", "all"),
        default="dense",
        help="what to time as compiled by torch.compile, too (default: dense; up to a minute for "
        "each model, batch size and precision)",
    )
    bench.add_argument(
        "--smaller",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="time the model on smaller images, too (default: yes)",
    )
    bench.add_argument("--json", metavar="FILE", help="write the numbers there")
    bench.add_argument("--out", metavar="FILE", help="draw them into this PNG")
    add_trust(bench)


def run(args: argparse.Namespace) -> int:
    """Run ``tokenenv bench``; returns the exit status."""
    from tokenenv.api.bench import bench

    if args.json and args.out and Path(args.json).resolve() == Path(args.out).resolve():
        raise UserError("--json and --out name the same file: give two")
    table = _Table()
    with contextlib.ExitStack() as places:  # before minutes of work
        places.enter_context(writable_file(args.json))
        places.enter_context(writable_file(args.out, "--out"))
        try:
            bench(
                args.what,
                model=args.model,
                weights=args.weights,
                data=args.data,
                batch=args.batch,
                threads=args.threads,
                rounds=args.rounds,
                execution=args.execution,
                compile=args.compile,
                smaller=args.smaller,
                device=args.device,
                dtype=args.dtype,
                preprocessing=preprocessing(args),
                trust=args.trust,
                show=table.show,
            )
        finally:
            if table.printed:  # also after Ctrl-C
                _write(args, table.speeds)
    return 0


class _Table:
    """Prints the rows of a table as they are measured.

    Attributes:
        speeds: the times shown last.
        printed: how many of their rows are printed.
    """

    speeds: Speeds
    printed = 0

    def show(self, speeds: Speeds) -> None:
        """Print the rows that were not printed before."""
        if not speeds.rows:
            print(f"{speeds.model}, {speeds.conditions}")
            print(_HEADER)
        for row in speeds.rows[self.printed :]:
            print(_line(row))
        self.speeds, self.printed = speeds, len(speeds.rows)


def _write(args: argparse.Namespace, found: Speeds) -> None:
    from tokenenv.measure.pictures import speed_picture
    from tokenenv.storage import write_bytes, write_json

    if args.json:
        write_json(Path(args.json), found.records())
        print(f"the numbers are in {args.json}")
    if args.out:
        write_bytes(Path(args.out), speed_picture(found.rows, found.model))
        print(f"the picture is in {args.out}")


def _names(text: str) -> list[str]:
    return text.split(",")


_HEADER = (
    f"{'batch':>5}  {'dtype':9}{'what':36}{'images/s':>9}{'speed-up (quartiles)':>24}{'GMACs':>9}"
    f"{'saved %':>9}{'peak MiB':>10}{'sliced':>8}{'share':>7}"
)


def _line(row: Speed) -> str:
    quartiles = f"{row.speedup:.3f} ({row.speedup_q25:.3f}-{row.speedup_q75:.3f})"
    limit = [
        "-" if value is None else f"{value:.3f}"
        for value in (row.slice_speedup, row.realised_share)
    ]
    return (
        f"{row.batch:5}  {row.dtype:9}{row.name:36}{row.images_per_s:9.1f}{quartiles:>24}"
        f"{row.gmacs:9.4f}{row.saved:9.1f}{row.peak_mib:10.1f}{limit[0]:>8}{limit[1]:>7}"
    )
