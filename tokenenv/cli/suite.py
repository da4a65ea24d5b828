"""``tokenenv suite``: its options, and the calls of :mod:`tokenenv.suite`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tokenenv.cli.options import Parser, add_dtype, add_trust, positive, seeds, writable_file
from tokenenv.errors import UserError
from tokenenv.paths import as_path

if TYPE_CHECKING:
    from tokenenv.suite.learners import Means
    from tokenenv.suite.report import Report


def add_parser(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the parser of ``tokenenv suite`` with its options."""
    suite = commands.add_parser(
        "suite",
        help="the benchmark: run learners on fixed tasks, score and draw them",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Fixed, versioned tasks with budgets, seeds and reference results. The score "
        "is the area under\na learner's front of top-1 over multiply-adds, scaled so that random "
        "decisions have 0 and a\nhindsight oracle has 1.",
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
        help="train learners and measure them on test images",
        description="Write one result per task, learner and seed. Results that exist are kept, so "
        "after Ctrl-C the same command continues.",
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
    run.add_argument(
        "--evaluate-every",
        type=positive,
        default=0,
        metavar="N",
        help="also measure the policies in training, once in N episodes, for a curve of the score",
    )
    _add_means(run)
    _add_validate(actions)
    _add_readers(actions)


def _add_validate(actions: argparse._SubParsersAction[Parser]) -> None:
    """The parser of the command that runs a stored result again."""
    validate = actions.add_parser(
        "validate",
        help="run a stored result again and say whether it is the same",
        description="Read a result, refuse it if it was edited, train and measure its learner with "
        "its seed again, and compare. The exit status is 0 if all is equal, else 1. Rounding "
        "depends on the processor and on the number of threads, which the result names.",
    )
    validate.add_argument("file", metavar="FILE", help="a result that 'run' wrote")
    _add_means(validate)


def _add_readers(actions: argparse._SubParsersAction[Parser]) -> None:
    """The parsers of the commands that show results."""
    score = actions.add_parser("score", help="tables of scores, beside the reference results")
    plot = actions.add_parser("plot", help="draw the fronts and the intervals of the scores")
    for reader in (score, plot):
        reader.add_argument(
            "out", metavar="DIR", nargs="?", help="of 'run'; left out: the references alone"
        )
    score.add_argument(
        "--marl-eval", metavar="FILE", help="write the scores there as marl-eval reads them"
    )
    plot.add_argument("--file", default="suite.png", metavar="PNG", help="default: suite.png")


def _add_means(command: argparse.ArgumentParser) -> None:
    """The options that say what learners train with."""
    command.add_argument("--weights", metavar="FILE", help="of DeiT-Tiny, for photographs")
    command.add_argument("--data", metavar="DIR", help="photographs to learn from, for those tasks")
    command.add_argument("--test-data", metavar="DIR", help="other photographs to test on")
    command.add_argument("--device", default="cpu", metavar="D", help="cpu, cuda ...; default: cpu")
    add_dtype(command, "precision that learners train in; tests are in float32")
    add_trust(command)


def run(args: argparse.Namespace) -> int:
    """Run ``tokenenv suite``; returns the exit status."""
    from tokenenv.storage import write_bytes
    from tokenenv.suite.picture import picture
    from tokenenv.suite.report import make_report
    from tokenenv.suite.results import read_result

    if args.action == "list":
        print(_listing())
        return 0
    if args.action == "run":
        _run(args)
        return 0
    if args.action == "validate":
        return _validate(args)
    report = make_report(map(read_result, _results(args)))
    if args.action == "score":
        with writable_file(args.marl_eval, "--marl-eval"):
            print(report.as_markdown(), end="")
            if args.marl_eval:
                _write_marl_eval(report, Path(args.marl_eval))
        return 0
    with writable_file(args.file, "--file"):
        write_bytes(Path(args.file), picture(report))
    print(f"the picture is in {args.file}")
    return 0


def _means(args: argparse.Namespace) -> Means:
    from tokenenv.suite.learners import Means

    every = getattr(args, "evaluate_every", 0)
    return Means(args.weights, args.data, args.device, args.dtype, every, args.trust)


def _validate(args: argparse.Namespace) -> int:
    from tokenenv.suite.run import replay

    path = as_path(args.file, "FILE")
    stored, differences = replay(path, test_data=args.test_data, means=_means(args))
    what = f"{stored.task} {stored.learner} seed {stored.seed}"
    print("\n".join([f"{what}: {'differs' if differences else 'equal'}", *differences]))
    return int(bool(differences))


def _run(args: argparse.Namespace) -> None:
    from tokenenv.suite.run import run_suite

    run_suite(
        args.tasks,
        args.learner,
        seeds=args.seeds,
        out=args.out,
        test_data=args.test_data,
        means=_means(args),
    )
    print(f"tokenenv suite score {args.out} and tokenenv suite plot {args.out} show the results")


def _listing() -> str:
    from tokenenv.suite.learners import BUILT_IN
    from tokenenv.suite.results import references
    from tokenenv.suite.tasks import TASKS

    lines = ["tasks:"]
    for task in TASKS:
        shown = len({result.learner for result in references(task.name)})
        lines.append(
            f"  {task.name:22} {task.level:7} {task.budget:6,} episodes, "
            f"{task.agent_steps / 1e6:5.2f} M agent-steps, {task.seeds} seeds; {task.description}"
            f"; references of {shown or 'no'} learners"
        )
    lines.append("learners:")
    for learner in BUILT_IN:
        lines.append(f"  {learner.name:15} {learner.summary}")
    lines.append("  NAME or DIR     a shipped policy or a run folder, as it is")
    lines.append(
        "  MODULE:NAME     your own function(task, seed), or FILE.py:NAME; see "
        "examples/suite_own_learner.py"
    )
    return "\n".join(lines)


def _results(args: argparse.Namespace) -> list[Path]:
    """The result files to score; none without a folder, so that only references are shown.

    Raises:
        UserError: the folder holds no results.
    """
    from tokenenv.suite.results import find_results

    if args.out is None:
        return []
    found = list(find_results(as_path(args.out, "DIR")))
    if not found:
        raise UserError(
            f"'{args.out}' holds no results: run tokenenv suite run TASK --learner NAME --out "
            f"{args.out} first, or leave the folder out to see the references"
        )
    return found


def _write_marl_eval(report: Report, path: Path) -> None:
    from tokenenv.storage import write_json

    layout, left_out = report.marl_eval()
    write_json(path, layout)
    print(f"\nscores for marl-eval are in {path}")
    if left_out:
        print(f"left out, as not all seeds and tasks were run: {', '.join(left_out)}")
