"""What the README shows works: its Python runs, and its commands are ones the parser takes."""

from __future__ import annotations

import ast
import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import timm

from tokenenv.cli.main import build_parser

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The fenced blocks in that language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """The words of every command in a bash block, ``tokenenv`` first; comments are left out."""
    found = []
    for line in "".join(blocks("bash")).replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word in (";", "&&", "||", "|", "&"):
                found.append(words)
                words = []
            else:
                words.append(word)
    return [words for words in found if words and words[0] == "tokenenv"]


# Python -------------------------------------------------------------------------------------------
class Session:
    """The README's Python blocks in order, one namespace for all, in an empty folder.

    Args:
        weights: a folder with ``<timm model>.safetensors`` for blocks that ask timm for pretrained
            weights; those blocks are left out without it.
    """

    def __init__(self, weights: Path | None) -> None:
        self.weights = weights
        self.namespace: dict[str, Any] = {"__name__": "readme"}
        self.done = 0

    def obstacle(self, block: str) -> str | None:
        """Why a block can't run here."""
        if "pretrained=True" in block and self.weights is None:
            return "needs ImageNet weights: set TOKENENV_DATA to a folder that has them"
        nodes = list(ast.walk(ast.parse(block)))
        names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
        names += [n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module]
        missing = [name for name in names if find_spec(name.split(".")[0]) is None]
        return f"{missing[0]} is not installed" if missing else None

    def run(self, index: int) -> None:
        """Run the block ``index``, after those before it that have not run in this session."""
        for i, block in enumerate(blocks("python")[: index + 1]):
            if i >= self.done and self.obstacle(block) is None:
                exec(compile(block, f"README.md, Python block {i + 1}", "exec"), self.namespace)
        self.done = max(self.done, index + 1)


@pytest.fixture(scope="module")
def session(request: pytest.FixtureRequest) -> Session:
    try:
        return Session(request.getfixturevalue("real_data") / "weights")
    except pytest.skip.Exception:
        return Session(None)


@pytest.mark.parametrize("index", range(len(blocks("python"))))
def test_python_blocks(
    index: int, session: Session, elsewhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason := session.obstacle(blocks("python")[index]):
        pytest.skip(reason)
    create = timm.create_model

    def from_files(name: str, pretrained: bool = False, **options: Any) -> Any:
        """As timm's, with pretrained weights from files in place of a download."""
        if pretrained and session.weights is not None:
            file = str(session.weights / f"{name}.safetensors")
            options["pretrained_cfg_overlay"] = {"file": file}
        return create(name, pretrained=pretrained, **options)

    monkeypatch.setattr(timm, "create_model", from_files)
    session.run(index)


# Commands -----------------------------------------------------------------------------------------
def test_there_are_commands() -> None:
    assert {words[1] for words in commands()} >= {"train", "evaluate", "compare", "suite"}


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_parse(words: list[str]) -> None:
    try:
        build_parser().parse_args(words[1:])
    except SystemExit as exit:
        assert exit.code == 0, f"the parser refuses: {shlex.join(words)}"  # --help ends with 0
