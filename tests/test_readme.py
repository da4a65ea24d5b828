"""What README and guides show works: Python runs, commands parse, and tables list what there is."""

from __future__ import annotations

import ast
import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import timm

from agents.policies import shipped
from agents.policies.words import usages
from agents.systems import SYSTEMS
from tokenenv.cli.main import build_parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md",
    "docs/commands.md",
    "docs/deploying.md",
    "docs/exploring.md",
    "docs/extending.md",
    "docs/games.md",
    "docs/methods.md",
    "docs/reproducing.md",
    "docs/scaling.md",
    "docs/training.md",
    "docs/tuning.md",
)


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(language: str, page: str) -> list[str]:
    """The page's fenced blocks in that language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text(page), re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """The words of every command in a bash block, ``tokenenv`` first; comments are left out."""
    found = []
    for line in "".join(blocks("bash", page)).replace("\\\n", " ").splitlines():
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
    """A page's Python blocks in order, one namespace for all, in an empty folder.

    Args:
        page: its path from the root of the repository.
        weights: a folder with ``<timm model>.safetensors`` for blocks that ask timm for pretrained
            weights; those blocks are left out without it.
    """

    def __init__(self, page: str, weights: Path | None) -> None:
        self.page, self.blocks, self.weights = page, blocks("python", page), weights
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
        for i, block in enumerate(self.blocks[: index + 1]):
            if i >= self.done and self.obstacle(block) is None:
                exec(compile(block, f"{self.page}, block {i + 1}", "exec"), self.namespace)
        self.done = max(self.done, index + 1)


@pytest.fixture(scope="module")
def sessions(request: pytest.FixtureRequest) -> dict[str, Session]:
    try:
        weights = request.getfixturevalue("real_data") / "weights"
    except pytest.skip.Exception:
        weights = None
    return {page: Session(page, weights) for page in PAGES}


@pytest.mark.parametrize(
    ("page", "index"), [(page, i) for page in PAGES for i in range(len(blocks("python", page)))]
)
def test_python_blocks(
    page: str,
    index: int,
    sessions: dict[str, Session],
    elsewhere: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = sessions[page]
    if reason := session.obstacle(session.blocks[index]):
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
SITE = ("docs/index.md", "docs/concepts.md", "docs/results.md", "docs/reproducing.md",
        "docs/suite.md", *sorted(
    page.relative_to(ROOT).as_posix() for page in (ROOT / "docs/start").glob("*.md")
))  # fmt: skip
"""More pages whose commands and links are looked at; tests/docs runs the quick starts."""


def test_there_are_commands() -> None:
    assert {words[1] for words in commands("README.md")} >= {
        "train", "evaluate", "bench", "compare", "compress", "suite",
    }  # fmt: skip


@pytest.mark.parametrize(
    "words", [w for page in (*PAGES, *SITE) for w in commands(page)], ids=" ".join
)
def test_commands_parse(words: list[str]) -> None:
    try:
        build_parser().parse_args(words[1:])
    except SystemExit as exit:
        assert exit.code == 0, f"the parser refuses: {shlex.join(words)}"  # --help ends with 0


# Tables -------------------------------------------------------------------------------------------
def listed(page: str, heading: str) -> list[str]:
    """The names in the first column of the table under a heading, without their arguments."""
    section = text(page).split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `([\w-]+)[`:]", section, re.MULTILINE)


def test_the_methods_page_lists_every_word() -> None:
    assert sorted(listed("docs/methods.md", "Words")) == sorted(usages())
    assert [name for name in shipped() if f"`{name}`" not in text("docs/methods.md")] == []


def test_the_training_page_lists_every_system() -> None:
    assert sorted(listed("docs/training.md", "Systems")) == sorted(SYSTEMS)


def test_what_the_changelog_says_is_imported_now_can_be() -> None:
    table = text("CHANGELOG.md").split("| before | now |")[1].split("\n\n")[0]
    names = re.findall(r"`([\w.]+)`", "\n".join(row.split("|")[2] for row in table.split("\n")[2:]))
    assert len(names) > 15
    assert [name for name in names if find_spec(name) is None] == []


@pytest.mark.parametrize("page", (*PAGES, *SITE))
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text(page))
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []
