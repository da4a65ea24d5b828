"""The command line. Parsing imports nothing heavy; the work is in :mod:`tokenenv.cli`."""

from __future__ import annotations

import argparse
import os
import sys

from tokenenv._version import __version__
from tokenenv.cli import train
from tokenenv.cli.options import (
    Parser,
    add_dtype,
    add_execution,
    add_model_options,
    batches,
    positive,
    seeds,
)
from tokenenv.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = Parser(
        prog="tokenenv",
        description="Vision Transformer inference as a Markov game: agents decide which tokens "
        "go on.",
        epilog="exit status: 0 done, 2 a mistake in what was asked for, 130 stopped by Ctrl-C",
    )
    parser.add_argument("--version", action="version", version=f"tokenenv {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train.add_parser(commands)
    _add_evaluate(commands)
    _add_compress(commands)
    _add_bench(commands)
    _add_compare(commands)
    _add_suite(commands)
    commands.add_parser(
        "envs",
        help="the registered environments, one line each",
        description="List the environments that gymnasium and PettingZoo know after "
        "'import tokenenv', one line each.",
    )
    return parser


_WHAT = (
    "a run folder (LTM's too) or a shipped policy (policies also with :threshold=0.6), keep-all, "
    "random:keep=0.7 (keep=0.5..0.9: a ratio per image), cls-attention:keep=0.7,blocks=3/6/9, "
    "norm:keep=0.7, tome:r=8, random-merge:r=8, merge-above:similarity=0.9, evit:keep=0.7, "
    "mstm:keep=0.7, pitome:keep=0.95, ats:tokens=150, zerotprune:keep=0.7, "
    "diffrate:prune=4,merge=4 or resize:size=192"
)


def _add_evaluate(commands: argparse._SubParsersAction[Parser]) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="accuracy, multiply-adds and speed of a policy against the dense model",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Run every image through the dense model and through a policy.",
        epilog="examples:\n  tokenenv evaluate runs/rl4evit-0\n"
        "  tokenenv evaluate cls-attention:keep=0.7,blocks=3/6/9 --model deit_tiny_patch16_224 "
        "--data val --json r.json",
    )
    evaluate.add_argument(
        "what",
        metavar="WHAT",
        help=_WHAT,
    )
    add_model_options(evaluate)
    add_dtype(evaluate)
    evaluate.add_argument("--limit", type=positive, metavar="N", help="at most N images")
    evaluate.add_argument("--batch", type=positive, default=64, metavar="N", help="default: 64")
    evaluate.add_argument(
        "--restrict",
        action="store_true",
        help="predict only among the classes of --data (the ImageNet-A and -R protocol)",
    )
    evaluate.add_argument(
        "--json", metavar="FILE", help="write the numbers and every image's predictions there"
    )


def _add_compress(commands: argparse._SubParsersAction[Parser]) -> None:
    compress = commands.add_parser(
        "compress",
        help="write a model and a policy as one faster model",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Write a folder that tokenenv.load_compressed reads, and on demand an ONNX "
        "file:\nfor one image at a time, whose tokens really leave.",
        epilog="examples:\n  tokenenv compress norm:keep=0.7 --out fast\n"
        "  tokenenv compress rl4evit-deit_tiny --weights deit.safetensors --out fast "
        "--export fast.onnx",
    )
    compress.add_argument("what", metavar="WHAT", help=_WHAT)
    add_model_options(compress, images=False)
    add_dtype(compress)
    add_execution(compress)
    compress.add_argument("--out", metavar="DIR", required=True, help="a new folder")
    compress.add_argument(
        "--export", metavar="FILE", help="write ONNX there (pip install tokenenv[export])"
    )


def _add_bench(commands: argparse._SubParsersAction[Parser]) -> None:
    bench = commands.add_parser(
        "bench",
        help="how much faster policies make a model, and how much faster they could",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Time the dense model and policies in turns, in one process. 'sliced' is the "
        "same model\nmerely cut to the policy's token counts: the limit. 'share' is the part of "
        "that speed-up\nthat is real. Images are those of --data, else random. The embedded digits "
        "model is too\nsmall to become faster: what a decision costs shows there.",
        epilog="examples:\n  tokenenv bench tome:r=3 random:keep=0.5..0.9\n"
        "  tokenenv bench tome:r=13 random:keep=0.5..0.9,blocks=3/6/9 --model "
        "deit_small_patch16_224 --weights random --batch 1,64 --json speed.json --out speed.png",
    )
    bench.add_argument("what", metavar="WHAT", nargs="+", help=_WHAT)
    add_model_options(bench)
    add_dtype(bench)
    bench.add_argument(
        "--batch", type=batches, default="1,8,64", metavar="N,N", help="default: 1,8,64"
    )
    bench.add_argument("--threads", type=positive, metavar="N", help="default: torch's choice")
    bench.add_argument("--rounds", type=positive, default=7, metavar="N", help="default: 7")
    add_execution(bench)
    bench.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="let torch.compile work on all of them (default: on CUDA)",
    )
    bench.add_argument("--json", metavar="FILE", help="write the numbers there")
    bench.add_argument("--out", metavar="FILE", help="draw them into this PNG")


def _add_compare(commands: argparse._SubParsersAction[Parser]) -> None:
    compare = commands.add_parser(
        "compare",
        help="many policies and runs on the same images: tables and a Pareto picture",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Evaluate policies and runs on one model and the same images, then time them "
        "in turns.\nA bar separates the values of a sweep. Writes table.md, table.csv, table.json "
        "and pareto.png.\n\nCtrl-C keeps the rows that are done; the same command goes on. Rows "
        "that are there already\nare not evaluated again, also when others are asked for beside "
        "them.",
        epilog="examples:\n  tokenenv compare 'tome:r=2|4|6|8' 'norm:keep=0.9|0.7|0.5'\n"
        "  tokenenv compare 'tome:r=4|8|12' 'cls-attention:keep=0.9|0.7,blocks=3/6/9|2/5/8' "
        "dora-deit_tiny\n      'dora-strict-deit_tiny:threshold=0.4|0.6' --data imagenet/val "
        "--limit 5000",
    )
    compare.add_argument(
        "what",
        metavar="WHAT",
        nargs="+",
        help=f"{_WHAT}; key=1|2|3 is a sweep",
    )
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


def _add_suite(commands: argparse._SubParsersAction[Parser]) -> None:
    suite = commands.add_parser(
        "suite",
        help="the benchmark: run learners on fixed tasks, score and draw them",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Fixed, versioned tasks with budgets, seeds and reference results. The score "
        "is the area under\na learner's front of top-1 over multiply-adds: random's is 0, a "
        "hindsight oracle's is 1.",
        epilog="examples:\n  tokenenv suite list\n"
        "  tokenenv suite run digits-prune-v0 --learner mappo\n"
        "  tokenenv suite run digits-prune-v0 --learner my_module:learn --seeds 0,1,2\n"
        "  tokenenv suite run deit-tiny-merge-v0 --learner dora-deit_tiny --data imagenet/train "
        "--test-data imagenet/val\n"
        "  tokenenv suite score suite --marl-eval scores.json",
    )
    actions = suite.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="tasks and learners, one line each")
    run = actions.add_parser(
        "run",
        help="let learners learn, and measure them on images that nobody learns from",
        description="One result for each task, learner and seed. Those that are there already are "
        "kept; after Ctrl-C the same command goes on.",
    )
    run.add_argument("tasks", metavar="TASK", nargs="+", help="see 'tokenenv suite list'")
    run.add_argument(
        "--learner",
        action="append",
        required=True,
        metavar="NAME",
        help="see 'tokenenv suite list'; a shipped policy; a run folder; or module:function or "
        "file.py:function, your own function(task, seed) that gives a policy or a list of them; "
        "repeatable",
    )
    run.add_argument("--seeds", type=seeds, metavar="S,S", help="default: those of the task")
    run.add_argument("--out", default="suite", metavar="DIR", help="default: suite")
    run.add_argument("--weights", metavar="FILE", help="of DeiT-Tiny, for tasks on photographs")
    run.add_argument("--data", metavar="DIR", help="photographs to learn from, for those tasks")
    run.add_argument("--test-data", metavar="DIR", help="other photographs to test on, for those")
    run.add_argument("--device", default="cpu", metavar="D", help="cpu, cuda ...; default: cpu")
    add_dtype(run, "what learners train in; tests are in float32")
    score = actions.add_parser("score", help="tables of scores, beside the reference results")
    plot = actions.add_parser("plot", help="fronts and intervals of the scores as a picture")
    for reader in (score, plot):
        reader.add_argument(
            "out", metavar="DIR", nargs="?", help="of 'run'; left out: the references alone"
        )
    score.add_argument(
        "--marl-eval", metavar="FILE", help="write the scores there as marl-eval reads them"
    )
    plot.add_argument("--file", default="suite.png", metavar="PNG", help="default: suite.png")


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 on success, 2 for a user's mistake, 130 after Ctrl-C, 141 if nobody reads what it prints.
    """
    args = build_parser().parse_args(argv)
    try:
        _check_torchrun(args.command)
        status = _run(args)
        sys.stdout.flush()
        return status
    except UserError as error:
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


def _run(args: argparse.Namespace) -> int:
    if args.command == "envs":
        from tokenenv.envs.ids import listing

        print(listing())
        return 0
    if args.command == "evaluate":
        from tokenenv.cli.evaluate import evaluate

        return evaluate(args)
    if args.command == "bench":
        from tokenenv.cli import bench

        return bench.run(args)
    if args.command == "compare":
        from tokenenv.cli import compare

        return compare.run(args)
    if args.command == "suite":
        from tokenenv.cli import suite

        return suite.run(args)
    if args.command == "compress":
        from tokenenv.cli import compress

        return compress.run(args)
    return train.run(args)


if __name__ == "__main__":
    sys.exit(main())
