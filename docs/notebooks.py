"""Make the notebooks of the quick starts: ``python docs/notebooks.py``.

Text becomes Markdown, Python becomes code, and commands become ``%%bash`` cells, but for those that
name weights from the network or a long training: they stay text. A block that is to be saved as a
file becomes a cell that writes it. So a page and its notebook say and do the same.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenenv.storage import write_bytes

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "examples/notebooks"
PAGES = {
    "tour": "ten_minute_tour",
    "method": "your_own_method",
    "learner": "your_own_learner",
    "engineer": "a_faster_model",
}
"""The quick starts in docs/start, and the names of their notebooks."""

ELSEWHERE = re.compile(r"deit_|runs/mine")
"""What a block names that needs weights from the network, or a long training."""

INSTALL = """\
import importlib.util

if importlib.util.find_spec("tokenenv") is None:
    %pip install -q tokenenv"""

_FENCE = re.compile(r"^```(\S+)(?: (\S+))?\n(.*?)^```$", re.M | re.S)


def notebook(page: str) -> str:
    """The notebook of a quick start, JSON."""
    text = (ROOT / f"docs/start/{page}.md").read_text(encoding="utf-8")
    cells = [cell("code", INSTALL, 0)]
    for kind, source in parts(text):
        if source.strip():
            cells.append(cell(kind, source.strip("\n"), len(cells)))
    cells.insert(0, cells.pop(1))  # the title stands above the installation
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    made = {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


def cell(kind: str, source: str, number: int) -> dict[str, Any]:
    """A cell; code has not run."""
    made: dict[str, Any] = {
        "cell_type": kind,
        "id": f"cell-{number}",
        "metadata": {},
        "source": source.splitlines(keepends=True),
    }
    return made | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def parts(text: str) -> Iterator[tuple[str, str]]:
    """Kind and source of each cell, in order."""
    at = 0
    for block in _FENCE.finditer(text):
        yield "markdown", prose(text[at : block.start()])
        yield from code(block[1], block[2], block[3], block[0])
        at = block.end()
    yield "markdown", prose(text[at:])


def code(language: str, argument: str, block: str, whole: str) -> Iterator[tuple[str, str]]:
    """What becomes of a fenced block: ``argument`` is the file that it includes, if it does."""
    if language == "{literalinclude}":
        path = ROOT / "docs/start" / argument
        yield "code", f"%%writefile {path.name}\n{path.read_text(encoding='utf-8')}"
    elif language == "bash":
        block = re.sub(r"^pip install .*\n", "", block, flags=re.MULTILINE)
        if ELSEWHERE.search(block):
            yield "markdown", whole
        elif block:
            yield "code", "%%bash\n" + re.sub(r"examples/(\w+\.py)", r"\1", block)
    elif found := re.match(r"# (\w+\.py)\n", block):
        yield "code", f"%%writefile {found[1]}\n{block[found.end() :]}"
    else:
        yield "code", block


def prose(text: str) -> str:
    """Text without Sphinx's markup, its links as seen from the notebook."""
    text = re.sub(r"^\([\w-]+\)=\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"\{py:\w+\}(`[^`]+`)", r"\1", text)
    return re.sub(r"\]\(([^)#]+)(#[^)]*)?\)", link, text)


def link(found: re.Match[str]) -> str:
    """A link to another page of the documentation; to a quick start, its notebook."""
    path, anchor = found[1], found[2] or ""
    if path.removesuffix(".md") in PAGES:
        return f"]({PAGES[path.removesuffix('.md')]}.ipynb)"
    place = posixpath.normpath(posixpath.join("docs/start", path))
    return f"](../../{place}{anchor})"


if __name__ == "__main__":
    for page, name in PAGES.items():
        write_bytes(NOTEBOOKS / f"{name}.ipynb", notebook(page).encode())
