"""Notebooks are made of the quick starts, have run nowhere yet, and run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from site_modules import site_module

notebooks = site_module("notebooks")
NAMES = sorted(notebooks.PAGES.values())


def cells(name: str) -> list[dict[str, Any]]:
    found = json.loads((notebooks.NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert (found["nbformat"], found["nbformat_minor"]) == (4, 5)
    made: list[dict[str, Any]] = found["cells"]
    return made


@pytest.mark.parametrize("page", notebooks.PAGES)
def test_a_notebook_is_what_its_page_says(page: str) -> None:
    path = notebooks.NOTEBOOKS / f"{notebooks.PAGES[page]}.ipynb"
    assert path.read_text(encoding="utf-8") == notebooks.notebook(page), "run docs/notebooks.py"


def test_there_is_no_other_notebook() -> None:
    assert sorted(path.stem for path in notebooks.NOTEBOOKS.iterdir()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_cells_have_no_outputs_and_compile(name: str) -> None:
    found = cells(name)
    assert len({cell["id"] for cell in found}) == len(found)
    assert found[0]["cell_type"] == "markdown" and found[0]["source"][0].startswith("# ")
    code = [cell for cell in found if cell["cell_type"] == "code"]
    assert "".join(code[0]["source"]) == notebooks.INSTALL
    assert "    %pip install -q tokenenv" in notebooks.INSTALL.splitlines()[-1:]
    for cell in code:
        assert cell["outputs"] == [] and cell["execution_count"] is None
        source = "".join(cell["source"])
        if source.startswith("%%bash\n"):
            subprocess.run(["bash", "-n", "-c", source.partition("\n")[2]], check=True)
        else:
            compile(plain(source), name, "exec")


def plain(source: str) -> str:
    """Python without IPython's commands."""
    source = re.sub(r"^%%writefile .*$", "", source, flags=re.MULTILINE)
    return source.replace("    %pip install -q tokenenv", "    pass")


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    text = "".join("".join(cell["source"]) for cell in cells(name))
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    assert [link for link in links if not (notebooks.NOTEBOOKS / link).exists()] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = pytest.importorskip("nbclient", reason="nbclient is not installed (extra: notebooks)")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    book = nbformat.read(notebooks.NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbformat.validate(book)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    client.NotebookClient(
        book, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert not any("Requirement" in str(output) for output in book.cells[1].outputs)  # no pip
