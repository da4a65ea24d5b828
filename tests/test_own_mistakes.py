"""Mistakes in naming a method of one's own: one line with the reason, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
from command_line import QUICK, mistake
from safetensors.torch import save_file

from tokenenv.cli.main import main

pytestmark = pytest.mark.usefixtures("one_thread", "own_methods")

COMMANDS = ("evaluate {}", "bench {}", "compare {}", "compress {} --out fast")


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("gone.py:First", "there is no file 'gone.py'"),
        ("no_such_module:First", "No module named 'no_such_module'"),
        ("methods.py:Frist", "there is no 'Frist' in it; did you mean 'First'?"),
        ("slip.py:First", "SyntaxError: invalid syntax (slip.py, line 1)"),
        ("lacks.py:First", "ModuleNotFoundError: No module named 'not_installed'"),
        ("broken.py:First", "ZeroDivisionError: division by zero"),
        ("leaves.py:First", "SystemExit: 3"),
        ("methods.py:number", "is 5: name a subclass of tokenenv.reducers.Reducer"),
        ("methods.py:Neither", "Neither'>: name a subclass of tokenenv.reducers.Reducer"),
        ("methods.py:five", "'methods.py:five' makes 5: name a subclass"),
        (
            "methods.py:fails:keep=0.3",
            "(LookupError: no table for this): correct it",
        ),
        ("methods.py:make:kepe=0.3", "unknown argument 'kepe': methods.py:make takes keep"),
        ("methods.py:First:kepe=0.3", "methods.py:First takes blocks, keep, least"),
        ("methods.py:First:keep=much", "keep=much is not a number"),
        ("methods.py:First:blocks=99", "99"),
        ("methods.py:ready:keep=0.3", "is a method already: leave ':keep=0.3' out"),
        ("methods.py:words:name=a", "needs blocks=..."),
        ("methods.py:Needy", "needs ratio=..."),
        ("methods.py:Needy:ratio=1,table=x", "table can't be given as a word"),
        ("methods.py:Loose:keep=0.3", "field 'keep' that can't be set: write @dataclass(frozen"),
    ],
)
def test_one_line_with_the_reason_before_any_weights(
    word: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("slip.py").write_text("def First(:")
    Path("lacks.py").write_text("import not_installed")
    Path("broken.py").write_text("1 / 0")
    Path("leaves.py").write_text("raise SystemExit(3)")
    for command in COMMANDS:
        # The weights are missing too; what is wrong with WHAT comes first.
        assert reason in mistake(command.format(word) + " --weights gone.safetensors", capfd)


@pytest.mark.parametrize("what", ["tome:r=x", "tom:r=4", "evit:kepe=1", "gone/run"])
def test_what_is_checked_before_weights(what: str, capfd: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        error = mistake(command.format(what) + " --weights gone.safetensors", capfd)
        assert f"'{what}'" in error and "gone.safetensors" not in error


@pytest.mark.parametrize(
    ("word", "line"),
    [("broken.py:First", "return 1 / 0"), ("late.py:make", "return 2 / 0")],
)
def test_the_traceback_shows_ones_own_line(
    word: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("broken.py").write_text("def f():\n    return 1 / 0\n\nf()\n")
    Path("late.py").write_text("def make():\n    return 2 / 0\n")
    assert main(["--traceback", "evaluate", word]) == 2
    error = capsys.readouterr().err
    assert line in error and f'{word.partition(":")[0]}", line 2, in ' in error
    assert "ZeroDivisionError: division by zero" in error
    assert error.splitlines()[-1].startswith(f"tokenenv: '{word}'")


def test_weights_without_a_model(capfd: pytest.CaptureFixture[str]) -> None:
    save_file(timm.create_model("digits_vit_16").state_dict(), "large.safetensors")
    for command in (*(each.format("methods.py:First") for each in COMMANDS), QUICK):
        error = mistake(f"{command} --weights large.safetensors", capfd)
        assert "no --model was given, so they were read for 'digits_vit'" in error
