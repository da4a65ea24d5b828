"""Copy a folder of ``tokenenv suite run`` into the package as the suite's reference results.

    OMP_NUM_THREADS=1 tokenenv suite run digits-prune-v0 --learner random --learner heuristic \
        --learner untrained --learner ippo --learner mappo
    OMP_NUM_THREADS=1 tokenenv suite run digits-merge-v0 --learner random --learner heuristic \
        --learner untrained --learner dora --learner sb3-ppo
    python benchmarks/suite_reference.py suite

Stored results of learners that the folder does not have are kept, if they can be compared with its
results: scores are relative to those of the learners random and heuristic.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from tokenenv.storage import write_bytes
from tokenenv.suite.report import make_report
from tokenenv.suite.results import REFERENCE, find_results, read_result, references
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
        new = {row.learner for row in rows}
        rows += [
            replace(row, reference=False) for row in references(task.name) if row.learner not in new
        ]
        make_report(rows)  # raises if they can't be compared or there is no yardstick
        lines = ",\n".join(json.dumps(row.as_json()) for row in rows)
        path = REFERENCE / f"{task.name}.json"
        write_bytes(path, f"[\n{lines}\n]\n".encode())
        print(f"{path}: {len(rows)} results of {len({row.learner for row in rows})} learners")


if __name__ == "__main__":
    main()
