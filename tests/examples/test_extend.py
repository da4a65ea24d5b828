"""The examples of methods of one's own run anywhere, offline, and print what they came to."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXTEND = ROOT / "examples/extend"


def printed(name: str, folder: Path) -> str:
    """What an example prints in an empty folder, which it leaves empty."""
    done = subprocess.run(
        [sys.executable, EXTEND / name],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not list(folder.iterdir())
    return done.stdout


def test_a_reducer(tmp_path: Path) -> None:
    own, tome = printed("own_reducer.py", tmp_path).splitlines()
    assert own.startswith("<Evaluated LongestValues(blocks=(3, 6, 9), keep=0.6) on digits_vit")
    assert tome.startswith("<Evaluated tome:r=4 on digits_vit")
    for line in (own, tome):
        found = re.search(r"top-1 (\S+) % \(dense (\S+) %\), (\S+) % fewer MACs, 200 images", line)
        assert found is not None, line
        top1, dense, saved = map(float, found.groups())
        assert dense >= 98 and top1 >= dense - 5 and 30 < saved < 60
    assert len((EXTEND / "own_reducer.py").read_text().splitlines()) <= 40


def test_a_reward(tmp_path: Path) -> None:
    lines = printed("own_reward.py", tmp_path).splitlines()
    numbers = [re.fullmatch(r"update \d: reward (\S+), keeps (\S+)", line) for line in lines]
    assert len(numbers) == 5 and all(numbers)
    rewards, keeps = zip(*(map(float, found.groups()) for found in numbers if found), strict=True)
    # Staying costs 0.02 at each of 3 decisions, and at first tokens are no loss to the class.
    assert -1 < rewards[0] < rewards[-1] < 0.1
    assert keeps[-1] < keeps[0] - 0.1


def test_a_task(tmp_path: Path) -> None:
    text = printed("own_task.py", tmp_path)
    scores = dict(re.findall(r"^\| `(.+)` \| \d \| .* \| (\S+) \[.*\|$", text, re.MULTILINE))
    assert list(sorted(scores, key=len)) == ["random", "heuristic", f"{EXTEND}/own_task.py:learn"]
    assert float(scores["random"]) == pytest.approx(0)
    assert float(scores[f"{EXTEND}/own_task.py:learn"]) > 0.3


def test_every_example_is_on_the_page() -> None:
    page = (ROOT / "docs/extending.md").read_text()
    listed = re.findall(r"^- `(\w+\.py)`", page, re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in EXTEND.glob("*.py"))
