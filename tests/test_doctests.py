"""The examples in docstrings of both packages, as they are installed, do what they show."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import agents
import tokenenv
from tokenenv.errors import UserError


def modules_with_examples() -> Iterator[str]:
    """Names of all modules whose text holds a prompt; none is imported to find out."""
    for package in (tokenenv, agents):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            path = Path(*found.name.split(".")[1:])
            folder = Path(package.__path__[0])
            file = folder / (path / "__init__.py" if found.ispkg else path.with_suffix(".py"))
            if ">>> " in file.read_text(encoding="utf-8"):
                yield found.name


def missing_import(tests: list[doctest.DocTest]) -> str | None:
    """The first package that examples import and that is not installed."""
    nodes = [n for t in tests for e in t.examples for n in ast.walk(ast.parse(e.source))]
    names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
    names += [n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module]
    return next((n for n in names if find_spec(n.split(".")[0]) is None), None)


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_in_docstrings(name: str, elsewhere: None) -> None:
    try:
        module = importlib.import_module(name)
    except UserError as error:
        if "is not installed: pip install" not in str(error):
            raise
        pytest.skip(str(error))
    tests = [test for test in doctest.DocTestFinder().find(module) if test.examples]
    assert tests, f"{name} has a prompt outside its docstrings"
    if missing := missing_import(tests):
        pytest.skip(f"{missing} is not installed")
    runner = doctest.DocTestRunner()
    for test in tests:
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


def test_a_wrong_example_fails() -> None:
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    lines: list[str] = []
    assert doctest.DocTestRunner().run(wrong, out=lines.append).failed == 1
    assert "Expected:\n    3\nGot:\n    2\n" in "".join(lines)
