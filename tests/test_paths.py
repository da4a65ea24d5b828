"""Paths that no system call takes are refused by name, in every function and command."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import mistake

import agents
import tokenenv
from tokenenv import UserError
from tokenenv.cli.main import main
from tokenenv.paths import as_path, path_text
from tokenenv.suite.run import run_suite

pytestmark = pytest.mark.usefixtures("elsewhere")

BAD: dict[str, Any] = {
    "is empty": "",
    "holds a NUL": "a\0b",
    "is too long": "a" * 300,
    "too long": "/".join(["a" * 200] * 30),
    "is not UTF-8": "caf\udce9",
    "not UTF-8": "a\ud800",
    "is no path": b"a",
    "no path": 5,
}


@pytest.mark.parametrize("words", BAD)
def test_what_is_wrong_is_named(words: str) -> None:
    with pytest.raises(UserError, match=f"^out.*{words}") as caught:
        path_text(BAD[words], "out")
    assert len(str(caught.value)) < 200


def test_paths_that_do() -> None:
    for good in ("a", "a" * 255, "ä/" + "b" * 255, Path("a"), "café"):
        assert str(as_path(good, "out")) == str(good)


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "train out": lambda p: tokenenv.train("rl4evit", out=p),
    "train weights": lambda p: tokenenv.train("rl4evit", weights=p),
    "train data": lambda p: tokenenv.train("rl4evit", data=p),
    "evaluate weights": lambda p: tokenenv.evaluate("keep-all", weights=p),
    "evaluate data": lambda p: tokenenv.evaluate("keep-all", data=p),
    "bench data": lambda p: tokenenv.bench(["keep-all"], data=p),
    "compare out": lambda p: tokenenv.compare(["keep-all"], out=p),
    "compress weights": lambda p: tokenenv.compress("digits_vit", "keep-all", weights=p),
    "save": lambda p: tokenenv.compress("digits_vit", "keep-all").save(p),
    "load_compressed": tokenenv.load_compressed,
    "export_onnx": lambda p: tokenenv.export_onnx(tokenenv.compress("digits_vit", "keep-all"), p),
    "Run.open": tokenenv.Run.open,
    "agents.load": agents.load,
    "load_ltm": tokenenv.ltm.load_ltm,
    "save_ltm": lambda p: tokenenv.ltm.save_ltm(
        tokenenv.ltm.ltm(tokenenv.load_backbone().model), p
    ),
    "load_backbone": lambda p: tokenenv.load_backbone(weights=p),
    "build_game data": lambda p: tokenenv.build_game(data=p),
    "build_game weights": lambda p: tokenenv.build_game(weights=p),
    "suite": lambda p: run_suite(["digits-prune-v0"], ["random"], out=p),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_refuse_them(name: str) -> None:
    for path in ("", "a" * 300, "a\0b", "caf\udce9"):
        with pytest.raises(UserError, match=r"is empty|is too long|holds a NUL|is not UTF-8"):
            FUNCTIONS[name](path)
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    "command",
    [
        "train rl4evit --out {}",
        "train rl4evit --data {}",
        "evaluate keep-all --limit 2 --json {}",
        "evaluate keep-all --weights {}",
        "evaluate keep-all --data {}",
        "bench keep-all --json {}",
        "bench keep-all --out {}",
        "compare keep-all --out {}",
        "compress keep-all --out {}",
        "compress keep-all --out fast --export {}",
        "suite run digits-prune-v0 --learner random --out {}",
        "suite score {}",
        "suite score --marl-eval {}",
        "suite plot --file {}",
    ],
)
def test_commands_refuse_them(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    for path, words in (("", "is empty"), ("a" * 300, "is too long"), ("caf\udce9", "not UTF-8")):
        assert words in mistake(command.format(shlex.quote(path)), capfd)


@pytest.mark.parametrize(
    "command", ["evaluate", "bench", "compare", "compress --out fast", "train"]
)
def test_a_long_word_is_no_path(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    for word in ("a" * 300, f"{'a' * 300}.py:Name", "diffrate:" + "/" * 300):
        mistake(f"{command} {word}", capfd)
    with pytest.raises(UserError, match="unknown model ''"):
        tokenenv.evaluate("keep-all", model="")


def test_a_long_word_that_is_a_method() -> None:
    many = "/".join(["1"] * 12)
    spec = f"diffrate:prune={many},merge={'0' * 200}1"
    assert len(spec) > 255 - 30
    assert main(["evaluate", spec, "--limit", "2"]) == 0
