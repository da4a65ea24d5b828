"""Copy a folder of ``tokenenv suite run`` into the package as the suite's reference results.

    OMP_NUM_THREADS=1 tokenenv suite run digits-prune-v0 --learner random --learner heuristic \
        --learner untrained --learner ippo --learner mappo
    OMP_NUM_THREADS=1 tokenenv suite run digits-merge-v0 --learner random --learner heuristic \
        --learner untrained --learner dora --learner sb3-ppo
    python benchmarks/suite_reference.py suite

A task's file is replaced as a whole, because scores are relative to its random and heuristic
learners.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tokenenv.storage import write_bytes
from tokenenv.suite.report import make_yardstick
from tokenenv.suite.results import REFERENCE, find_results, read_result
from tokenenv.suite.tasks import TASKS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    results = [read_result(path) for path in find_results(args.folder)]
    if not results:
        parser.error(f"no results of the suite in {args.folder}: give what 'suite run' wrote to")
    for task in TASKS:
        rows = [result for result in results if result.task == task.name]
        if not rows:
            continue
        make_yardstick(task, rows)  # raises if the task has no yardstick
        lines = ",\n".join(json.dumps(row.as_json()) for row in rows)
        path = REFERENCE / f"{task.name}.json"
        write_bytes(path, f"[\n{lines}\n]\n".encode())
        print(f"{path}: {len(rows)} results of {len({row.learner for row in rows})} learners")


if __name__ == "__main__":
    main()
