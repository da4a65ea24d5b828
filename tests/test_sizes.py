"""Files and functions stay short enough to be read in one go."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILE_LINES = 450
BODY_LINES = 60


def files() -> Iterator[Path]:
    for folder in ("tokenenv", "agents", "examples", "benchmarks", "docs", "tests"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def bodies(source: str) -> Iterator[tuple[str, int]]:
    """Name of each function, and the lines of its body without the docstring."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            last = body[-1].end_lineno if body else None
            yield node.name, last - body[0].lineno + 1 if last is not None else 0


def test_no_file_is_longer_than_450_lines() -> None:
    lengths = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in files()}
    assert len(lengths) > 100
    assert {str(p): n for p, n in lengths.items() if n > FILE_LINES} == {}


def test_no_function_body_is_longer_than_60_lines() -> None:
    long = {
        f"{path.relative_to(ROOT)}:{name}": lines
        for path in files()
        for name, lines in bodies(path.read_text(encoding="utf-8"))
        if lines > BODY_LINES
    }
    assert long == {}


def test_lines_of_a_body_are_those_after_the_docstring() -> None:
    source = 'def f():\n    """A\n\n    long one."""\n    x = 1\n\n    return x\n'
    assert list(bodies(source)) == [("f", 3)]
    assert list(bodies('def f():\n    """Nothing else."""\n')) == [("f", 0)]
