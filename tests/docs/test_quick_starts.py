"""The quick starts do as printed: each page's Python, and with its commands, in one folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from site_modules import site_module

ROOT = Path(__file__).parents[2]
PAGES, ELSEWHERE = (getattr(site_module("notebooks"), name) for name in ("PAGES", "ELSEWHERE"))
TRAINING = re.compile(r"tokenenv\.train\(")
"""What takes long, and is run where commands are; the README's own training is always run."""


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of each fenced block of Python or commands, in order."""
    text = (ROOT / "docs" / "start" / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(r"^```(bash|python)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def named_file(block: str) -> str | None:
    """The name of the file that a block is to be saved as, which stands in its first line."""
    found = re.match(r"# (\w+\.py)\n", block)
    return found[1] if found else None


def script(page: str) -> str:
    """One Python program that does what the page says, block by block."""
    lines = ["import subprocess, sys", "sys.path.insert(0, '')", "names = {'__name__': 'page'}"]
    for language, block in blocks(page):
        if language == "bash":
            block = re.sub(r"^pip install .*\n", "", block, flags=re.MULTILINE)  # it is installed
            shell = ["bash", "-euo", "pipefail", "-c", block]
            if not ELSEWHERE.search(block):
                lines.append(f"subprocess.run({shell!r}, check=True)")
        elif name := named_file(block):
            lines.append(f"open({name!r}, 'w').write({block!r})")
        else:
            lines.append(f"exec(compile({block!r}, {page!r}, 'exec'), names)")
    return "\n".join(lines)


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_quick_start_works(
    page: str, elsewhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", ["", *sys.path])
    names = {"__name__": "page"}
    for number, (language, block) in enumerate(blocks(page)):
        if language == "python" and (name := named_file(block)):
            Path(name).write_text(block, encoding="utf-8")
        elif language == "python" and not TRAINING.search(block):
            exec(compile(block, f"{page}, block {number}", "exec"), names)
    sys.modules.pop("my_methods", None)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_a_quick_start_works_as_printed(page: str, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")  # as in the repository's root
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ended = subprocess.run(
        [sys.executable, "-c", script(page)],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]


def test_what_is_left_out_is_little() -> None:
    for page in PAGES:
        commands = [block for language, block in blocks(page) if language == "bash"]
        assert sum(bool(ELSEWHERE.search(block)) for block in commands) <= len(commands) / 2, page
        assert any(language == "python" for language, _ in blocks(page)), page
