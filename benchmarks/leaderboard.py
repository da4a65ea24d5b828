"""Write docs/leaderboard.md from the suite's stored references.

python benchmarks/leaderboard.py
"""

from __future__ import annotations

from pathlib import Path

from tokenenv.storage import write_bytes
from tokenenv.suite.report import make_report
from tokenenv.suite.results import references
from tokenenv.suite.tasks import TASKS

PAGE = Path(__file__).parent.parent / "docs" / "leaderboard.md"

HEAD = """# Leaderboard

Written by `python benchmarks/leaderboard.py` from the results that come with the package
(`tokenenv/suite/reference`). How scores are made: `tokenenv/suite/score.py`. `tokenenv suite run
TASK --learner NAME` makes results of yours, `tokenenv suite score` puts them beside these, and
`tokenenv suite validate FILE` makes one again and says whether it is the same. Tasks of version 1
and later measure everybody by the concave hull of points that are chosen on training images; those
of version 0 are kept as they were.
"""


def page() -> str:
    """The page; version 1 and later first."""
    stored = [task for task in TASKS if references(task.name)]
    stored.sort(key=lambda task: task.name.endswith("-v0"))
    report = make_report([])
    return "\n\n".join([HEAD.rstrip(), *(report.tables(task) for task in stored)]) + "\n"


if __name__ == "__main__":
    write_bytes(PAGE, page().encode())
    print(PAGE)
