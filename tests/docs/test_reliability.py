"""docs/reliability.md names tests that exist, in an order in which a row can be found."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def rows() -> list[str]:
    lines = (ROOT / "docs/reliability.md").read_text().splitlines()
    return [line for line in lines if line.startswith("| ")][1:]


def test_each_kind_of_fault_has_a_test_that_exists() -> None:
    assert rows()
    for row in rows():
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named, row
        for file, test in named:
            assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.M), (file, test)


def test_the_rows_are_sorted_by_subject() -> None:
    subjects = [row.split("|")[1].partition(":")[0].strip() for row in rows()]
    assert subjects == sorted(subjects)
