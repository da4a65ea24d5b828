"""Imports follow the table in CONTRIBUTING.md, and generic code asks for no concrete class."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Import:
    """One module imports another; ``early``: as soon as it is imported itself."""

    importer: str
    imported: str
    early: bool


# Reading the source -------------------------------------------------------------------------------
@cache
def sources() -> dict[str, Path]:
    """Every module of the packages, by its dotted name."""
    found = {}
    for path in sorted(
        p for package in ("tokenenv", "agents") for p in (ROOT / package).rglob("*.py")
    ):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def named_by(node: ast.AST, modules: set[str]) -> Iterator[str]:
    """The modules among ``modules`` that a node imports, or names for ``import_module``."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in modules)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: imports are absolute here"
        module = node.module or ""
        for name in (f"{module}.{alias.name}" for alias in node.names):
            if name in modules or module in modules:
                yield name if name in modules else module
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        match = re.fullmatch(r"((?:tokenenv|agents)(?:\.\w+)+)(?::\w+)?", node.value)
        if match and match[1] in modules:
            yield match[1]


def walk(node: ast.AST, early: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes below; ``early`` is false inside functions and under ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        yield child, early
        deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            deferred = True
        yield from walk(child, early and not deferred)


def imports(source: str, importer: str, modules: set[str]) -> set[Import]:
    """All imports in the source of module ``importer``."""
    return {
        Import(importer, name, early and not isinstance(node, ast.Constant))
        for node, early in walk(ast.parse(source))
        for name in named_by(node, modules)
        if name != importer
    }


@cache
def all_imports() -> frozenset[Import]:
    modules = set(sources())
    return frozenset(
        found
        for name, path in sources().items()
        for found in imports(path.read_text(encoding="utf-8"), name, modules)
    )


# The table ----------------------------------------------------------------------------------------
@cache
def rooms() -> dict[str, tuple[int, int]]:
    """Each name in the table: its layer, and its row."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (`[^|]+`) \|", text, re.MULTILINE)
    found = {}
    for row, (layer, cell) in enumerate(rows):
        for name in re.findall(r"`([\w.]+)`", cell):
            assert name not in found, f"{name} stands twice in the table of CONTRIBUTING.md"
            found[name] = (int(layer), row)
    return found


def room_of(module: str) -> tuple[int, int]:
    """The layer and the row of a module: those of the longest name it starts with."""
    name = module
    while name not in rooms() or (name == "tokenenv" and name != module):
        assert "." in name, f"{module} has no row in the table of CONTRIBUTING.md"
        name = name.rpartition(".")[0]
    return rooms()[name]


def breaks_the_table(found: Import) -> bool:
    """Whether an import leads upwards, or to another room of the same layer."""
    layer, row = room_of(found.importer)
    other, other_row = room_of(found.imported)
    return other_row != row and other >= layer


def test_every_row_of_the_table_is_there() -> None:
    assert {name for name in rooms() if name not in sources()} == set()


def test_imports_lead_down_the_table() -> None:
    assert len(all_imports()) > 300
    wrong = {(i.importer, i.imported) for i in all_imports() if breaks_the_table(i)}
    assert not wrong


@pytest.mark.parametrize(
    ("importer", "source", "wrong"),
    [
        ("tokenenv.vit.tokens", "import tokenenv.game.game", True),
        ("tokenenv.vit.tokens", "from tokenenv import game", True),
        ("tokenenv.vit.tokens", "from tokenenv import UserError", True),
        ("tokenenv.vit.tokens", "def late():\n    from agents.workers import Workers", True),
        ("tokenenv.vit.tokens", "if TYPE_CHECKING:\n    from tokenenv.data import Split", True),
        ("tokenenv.vit.tokens", "HOME = 'tokenenv.cli.main:main'", True),
        ("tokenenv.ltm.model", "from tokenenv.reducers import Reducer", True),
        ("tokenenv.errors", "from tokenenv.vit import tokens", True),
        ("tokenenv.game.game", "from tokenenv.vit.tokens import Tokens", False),
        ("tokenenv.game.game", "from tokenenv.game.rules import Rules", False),
        ("tokenenv.storage", "from tokenenv.errors import UserError", False),
        ("tokenenv.token_prune_v0", "from tokenenv.envs import layer", False),
        ("tokenenv.cli.main", "import agents", False),
    ],
)
def test_what_breaks_the_table(importer: str, source: str, wrong: bool) -> None:
    (found,) = imports(source, importer, set(sources()))
    assert breaks_the_table(found) is wrong


# Circles ------------------------------------------------------------------------------------------
def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle in the graph, in order; empty if there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        for other in sorted(graph.get(name, ())):
            if found := visit(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


def test_imports_form_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for found in all_imports():
        if found.early:
            graph.setdefault(found.importer, set()).add(found.imported)
    assert circle(graph) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


def test_only_imports_at_the_top_count_for_circles() -> None:
    source = """
import agents
try:
    import tokenenv.errors
except ImportError:
    pass
if TYPE_CHECKING:
    import tokenenv.game
def late():
    import tokenenv.data
"""
    found = imports(source, "tokenenv.cli.main", set(sources()))
    assert {i.imported: i.early for i in found} == {
        "agents": True, "tokenenv.errors": True, "tokenenv.game": False, "tokenenv.data": False,
    }  # fmt: skip


def test_every_room_that_imports_agents_checks_which_they_are() -> None:
    """Another distribution's package of that name has to be refused before it runs."""
    layer, _ = room_of("agents")
    users = {i.importer for i in all_imports() if i.imported.split(".")[0] == "agents"}
    folders = {".".join(name.split(".")[:2]) for name in users if room_of(name)[0] > layer}
    assert folders
    for folder in folders:
        text = sources()[folder].read_text(encoding="utf-8")
        assert re.search(r"^ *require_own_agents\(\)$", text, re.MULTILINE), folder


# Concrete classes ---------------------------------------------------------------------------------
EXTENSIBLE = (
    "tokenenv/vit/families", "tokenenv/game/rules", "tokenenv/game/rewards", "tokenenv/reducers",
    "agents/policies",
)  # fmt: skip
"""Where classes lie that a third party may add to: code elsewhere must not ask which one it has."""


@cache
def concrete_classes() -> dict[str, str]:
    """Name of each concrete class in those folders -> its folder. Bases stand in ``base.py``."""
    found = {}
    for folder in EXTENSIBLE:
        for path in (ROOT / folder).glob("*.py"):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef) and path.name != "base.py":
                    bases = {ast.unparse(base).split("[")[0] for base in node.bases}
                    if not bases & {"Protocol", "ABC"}:
                        found[node.name] = folder
    return found


def asked_for(node: ast.AST) -> Iterator[str]:
    """Names of the classes that a node compares an object's class with."""
    asked: list[ast.expr] = []
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
        asked = node.args[1:]
    elif isinstance(node, ast.MatchClass):
        asked = [node.cls]
    elif isinstance(node, ast.Compare) and ast.unparse(node.left).startswith("type("):
        asked = node.comparators
    for expression in asked:
        for part in ast.walk(expression):
            if isinstance(part, ast.Name):
                yield part.id
            elif isinstance(part, ast.Attribute):
                yield part.attr


def test_no_room_asks_for_a_concrete_class_of_another() -> None:
    classes = concrete_classes()
    assert {"TokenPrune", "Dora", "ATS", "ActorPolicy"} <= classes.keys()
    wrong = set()
    for name, path in sources().items():
        folder = path.parent.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for asked in asked_for(node):
                if not (folder + "/").startswith(classes.get(asked, folder) + "/"):
                    wrong.add((name, asked))
    assert not wrong


@pytest.mark.parametrize(
    "source",
    [
        "isinstance(x, Dora)",
        "isinstance(x, (int, rewards.Dora))",
        "isinstance(x, int | Dora)",
        "type(x) is Dora",
        "match x:\n    case Dora(): pass",
    ],
)
def test_ways_to_ask_for_a_class(source: str) -> None:
    assert "Dora" in {name for node in ast.walk(ast.parse(source)) for name in asked_for(node)}


def test_the_registries_that_contributing_names_are_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    row = r"^\| [\w ]+ \| `([\w.]+)\.(\w+)` \| `(\w+)` in `([\w/]+)\.py` \| (?:`@(\w+))?"
    rows = re.findall(row, text, re.MULTILINE)
    assert len(rows) == 7
    for module, base, registry, path, decorator in rows:
        assert hasattr(import_module(module), base), f"{module}.{base}"
        home = import_module(path.replace("/", ".").removesuffix(".__init__"))
        assert hasattr(home, registry), f"{path}.py: {registry}"
        assert not decorator or callable(getattr(home, decorator)), f"{path}.py: {decorator}"
