"""``tokenenv suite``: run learners on the suite's tasks, score them, draw them."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tokenenv.cli.evaluate import writable_file
from tokenenv.errors import UserError
from tokenenv.measure.printing import report_skipped
from tokenenv.measure.state import conditions, fingerprint
from tokenenv.storage import writable_folder, write_bytes, write_json
from tokenenv.suite.learners import BUILT_IN, Learner, Means, find_learner
from tokenenv.suite.opened import (
    OpenTask,
    dense_hits,
    dense_predictions,
    open_task,
    read_points,
    sweep,
)
from tokenenv.suite.picture import picture
from tokenenv.suite.report import Report, make_report
from tokenenv.suite.results import (
    Result,
    check_conditions,
    find_results,
    read_result,
    references,
)
from tokenenv.suite.tasks import POINTS, TASKS, Task, find_task


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    if args.action == "list":
        print(_listing())
        return 0
    if args.action == "run":
        _run(args)
        return 0
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


def _listing() -> str:
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
        lines.append(f"  {learner.name:12} {learner.summary}")
    lines.append("  NAME or DIR  a shipped policy or a run folder, as it is")
    lines.append(
        "  MODULE:NAME  your own function(task, seed), or FILE.py:NAME; see "
        "examples/suite_own_learner.py"
    )
    return "\n".join(lines)


def _run(args: argparse.Namespace) -> None:
    """Run what is missing, one file for each task, learner and seed."""
    tasks = [find_task(name) for name in dict.fromkeys(args.tasks)]
    learners = [find_learner(name) for name in dict.fromkeys(args.learner)]
    for task in tasks:
        for learner in learners:
            learner.check(task)
    out = Path(args.out)
    with writable_folder(out):
        try:
            for task in tasks:
                opened = open_task(
                    task,
                    weights=args.weights,
                    data=args.data,
                    test_data=args.test_data,
                    device=args.device,
                )
                _run_task(opened, learners, out, args)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("results so far are kept; the same command goes on") from None
    print(f"tokenenv suite score {out} and tokenenv suite plot {out} show the results")


def _run_task(
    opened: OpenTask, learners: list[Learner], out: Path, args: argparse.Namespace
) -> None:
    """Write the results that are missing."""
    task, test = opened.spec, opened.test
    common = {
        **conditions(task.model, opened.backbone.model, test),
        "learnt_from": f"{opened.train.name}, {len(opened.train)} images",
        "task": task.settings(),
    }
    missing = []
    for learner in learners:
        now = {**common, "code": learner.code}
        learnt_in = args.dtype if learner.trains else learner.learnt_in
        if learnt_in:
            now["learnt_in"] = learnt_in
        for seed in _seeds(args.seeds, task, learner):
            path = _place(out, task, learner, seed)
            if path.is_file():
                _print_result(_kept(path, learner, now), "kept")
            else:
                missing.append((learner, seed, path, now))
    if missing:
        dense = dense_predictions(opened)
    for number, (learner, seed, path, now) in enumerate(missing, 1):
        # Only a run under the same conditions is gone on with.
        digest = hashlib.sha256(json.dumps(now, sort_keys=True).encode()).hexdigest()[:8]
        folder = out / "runs" / f"{path.stem}-{digest}"
        result = _run_one(opened, learner, seed, dense, folder, args, now)
        write_json(path, result.as_json())
        _print_result(result, f"{number}/{len(missing)}, {result.seconds:.0f} s")
    report_skipped(test)


def _run_one(
    opened: OpenTask,
    learner: Learner,
    seed: int,
    dense: torch.Tensor,
    folder: Path,
    args: argparse.Namespace,
    now: dict[str, Any],
) -> Result:
    """Let a learner learn, and read its points."""
    task, start = opened.spec, time.perf_counter()
    opened.played, opened.learnt_in = 0, set()
    means = Means(args.weights, args.data, args.device, args.dtype)
    policies = learner.learn(opened, seed, folder, means)
    opened.check_budget()
    if fingerprint(opened.backbone.model.state_dict()) != now["weights"]:
        raise UserError(
            f"learner '{learner.name}' changed the weights of '{task.model}', which stay frozen in "
            "the suite: let it work on a copy"
        )
    for policy in policies.values():
        opened.check_policy(policy)
        if isinstance(policy, torch.nn.Module):
            policy.to(opened.backbone.device).eval()
    only = next(iter(policies.values()))
    swept = len(policies) == 1 and only.adjustable
    images = len(opened.test) * (POINTS if swept else len(policies))
    words = f"{learner.name} seed {seed}"
    with tqdm(total=images, unit="image", desc=words, leave=False, disable=None) as bar:
        if swept:
            points = sweep(opened, only, dense, bar.update)
        else:
            points = read_points(opened, policies, dense, bar.update)
    result = Result(
        task.name,
        learner.name,
        seed,
        {"learnt_in": " and ".join(sorted(opened.learnt_in)) or "float32", **now},
        round(time.perf_counter() - start, 1),
        opened.backbone.classes,
        int((dense >= 0).sum()),
        dense_hits(opened, dense),
        tuple(points),
    )
    _ = result.area  # refuses numbers that are none, before they are kept
    return result


def _seeds(asked: list[int] | None, task: Task, learner: Learner) -> list[int]:
    if learner.deterministic:
        return [0]
    return asked if asked is not None else list(range(task.seeds))


def _place(out: Path, task: Task, learner: Learner, seed: int) -> Path:
    name = re.sub(r"[^\w.-]+", "_", learner.name)
    return out / "results" / task.name / f"{task.name}-{name}-{seed}.json"


def _kept(path: Path, learner: Learner, now: dict[str, Any]) -> Result:
    """A result that is there already.

    Raises:
        UserError: it can't be read, or is of another learner or made under other conditions.
    """
    result = read_result(path)
    if result.learner != learner.name:
        raise UserError(
            f"'{path}' holds learner '{result.learner}', not '{learner.name}': give another --out"
        )
    check_conditions(result, now, path)
    return result


def _print_result(result: Result, note: str) -> None:
    print(
        f"{result.task} {result.learner} seed {result.seed}: top-1 {100 * result.area:.2f} % over "
        f"the range, {100 * result.saved():.1f} % saved within a point ({note})",
        flush=True,
    )


def _results(args: argparse.Namespace) -> list[Path]:
    """The files to score; without a folder none, and the references are shown.

    Raises:
        UserError: the folder holds none.
    """
    if args.out is None:
        return []
    found = list(find_results(Path(args.out)))
    if not found:
        raise UserError(
            f"'{args.out}' holds no results: run tokenenv suite run TASK --learner NAME --out "
            f"{args.out} first, or leave the folder out to see the references"
        )
    return found


def _write_marl_eval(report: Report, path: Path) -> None:
    layout, left_out = report.marl_eval()
    write_json(path, layout)
    print(f"\nscores for marl-eval are in {path}")
    if left_out:
        print(f"left out, as not all seeds and tasks were run: {', '.join(left_out)}")
