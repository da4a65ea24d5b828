"""Objects of a user's own by name: what is found, and what is said where it isn't."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pickle
import sys
from pathlib import Path

import pytest

from tokenenv.errors import UserError
from tokenenv.own import is_own, load_own

SOURCE = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Point:
    x: int = 3

number = 5
"""


@pytest.fixture(autouse=True)
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    monkeypatch.setattr("sys.path", list(sys.path))
    Path("points.py").write_text(SOURCE)
    Path("broken.py").write_text("raise KeyError('what is\\n missing')")
    Path("slip.py").write_text("def learn(:")


@pytest.mark.parametrize("word", ["a:b", "a.b.c:Name", "x/y.py:Name", "/a b/c.py:Name", "./a.py:B"])
def test_what_looks_like_ones_own(word: str) -> None:
    assert is_own(word)


@pytest.mark.parametrize(
    "word", ["dora", "random:keep=0.5", "runs/x-0:threshold", ":f", "a:", "a.py", "..up:f", "a-b:c"]
)
def test_what_does_not(word: str) -> None:
    assert not is_own(word)


def test_a_file(tmp_path: Path) -> None:
    own = load_own("points.py:Point")
    digest = hashlib.sha256(SOURCE.encode()).hexdigest()
    assert own.origin == {"file": str(tmp_path / "points.py"), "sha256": digest}
    assert own.object is load_own(f"{tmp_path}/points.py:Point").object  # imported once
    point = own.object(7)
    assert pickle.loads(pickle.dumps(point)) == point
    assert dataclasses.fields(own.object)[0].default == 3
    assert load_own("points.py:number").object == 5


def test_a_file_that_changes() -> None:
    before = load_own("points.py:Point")
    Path("points.py").write_text(SOURCE.replace("3", "4"))
    after = load_own("points.py:Point")
    assert (before.object().x, after.object().x) == (3, 4)
    assert before.origin["sha256"] != after.origin["sha256"]


def test_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "points", raising=False)
    own = load_own("points:Point")
    digest = hashlib.sha256(SOURCE.encode()).hexdigest()
    assert own.object().x == 3
    assert own.origin == {"module": "points", "sha256": digest}
    # What has no place in a source of its own goes by its module.
    assert load_own("points:number").origin == own.origin
    assert load_own("sys:maxsize").origin == {"module": "sys"}


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("gone.py:f", "'gone.py:f' can't be imported (there is no file 'gone.py')"),
        ("no_such_module:f", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("broken.py:f", "(KeyError: 'what is\\n missing')"),
        ("slip.py:f", "invalid syntax (slip.py, line 1)"),
        ("points.py:Pont", "there is no 'Pont' in it; did you mean 'Point'?"),
        ("points.py:zzz", "there is no 'zzz' in it)"),
        (":f", "'' is no module's name"),
    ],
)
def test_mistakes(word: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_own(word)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    fails = word in ("broken.py:f", "slip.py:f")  # its own code, so the name is right
    assert ("--traceback shows the line" if fails else "give module:Name") in str(caught.value)


def test_ones_own_traceback_is_kept() -> None:
    for _ in range(2):  # a file that fails is not taken for imported
        with pytest.raises(UserError) as caught:
            load_own("broken.py:f")
        assert isinstance(caught.value.__cause__, KeyError)


def test_what_runs_is_what_was_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if a file changes within a second and keeps its size, and bytecode is written."""
    monkeypatch.setattr("sys.dont_write_bytecode", False)
    path = Path("fast.py")
    for text in ("value = 1\n", "value = 2\n"):
        path.write_text(text)
        os.utime(path, (1e9, 1e9))
        own = load_own("fast.py:value")
        assert f"value = {own.object}\n" == text
        assert own.origin["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert not Path("__pycache__").exists()
