"""What tests of the command line share: commands, what they write, what they refuse."""

from __future__ import annotations

import json
import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tokenenv.cli.main import main
from tokenenv.vit.digits import digits

QUICK = (
    "train rl4evit --images 60 --set updates=3 --set evaluate_every=1 --set batch=8 "
    "--set hidden=8 --set epochs=1 --set minibatches=1 --set calibrate=2 --set blocks=1/4"
)


class Failed(Exception):
    """For what must not be called, or goes wrong on purpose."""


def fail(*args: Any, **kwargs: Any) -> Any:
    raise Failed


def write_digits(root: Path, count: int, only: str = "0123456789") -> None:
    """``count`` test digits as ``root/DIGIT/NUMBER.png``."""
    images, labels = digits("test")
    wanted = [i for i, label in enumerate(labels.tolist()) if str(label) in only]
    for i in wanted[:count]:
        folder = root / str(int(labels[i]))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i, 0].numpy()).save(folder / f"{i}.png")


def evaluation(command: str) -> dict[str, Any]:
    """What ``tokenenv evaluate COMMAND`` writes."""
    assert main(["evaluate", *shlex.split(command), "--json", "r.json"]) == 0
    return json.loads(Path("r.json").read_text())


def tree(root: Path) -> dict[str, bytes | None]:
    """All files and folders below ``root``."""
    return {
        str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in root.rglob("*")
    }


def mistake(command: str, capfd: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr that ``command`` ends in, having changed no file."""
    before = tree(Path.cwd())
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as warned:  # each would be more lines
        warnings.simplefilter("always", UserWarning)
        try:
            status = main(shlex.split(command))
        except SystemExit as exit:
            status = exit.code
    error = capfd.readouterr().err
    assert status == 2, error
    assert not [str(w.message) for w in warned if issubclass(w.category, UserWarning)]
    assert error.count("\n") == 1, error
    assert error.startswith("tokenenv")
    assert tree(Path.cwd()) == before
    return error
