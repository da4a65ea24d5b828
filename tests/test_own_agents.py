"""Another distribution's package named ``agents`` is recognised and named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tokenenv

ROOT = Path(tokenenv.__file__).resolve().parents[1]


def _python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in ``folder``, which so stands on ``sys.path`` before the package under test."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


@pytest.fixture(params=["agents.py", "agents/__init__.py"])
def other(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Somebody else's ``agents``, which must not be run to be recognised."""
    file = tmp_path / request.param
    file.parent.mkdir(exist_ok=True)
    file.write_text("raise RuntimeError('ran')\n")
    return tmp_path / Path(request.param).parts[0]


@pytest.mark.parametrize(
    "code",
    [
        "import tokenenv; tokenenv.compress",
        "import tokenenv; tokenenv.train",
        "import tokenenv.suite",
        "from tokenenv.cli.main import main",
    ],
)
def test_another_agents_first_on_the_path_is_named_with_the_remedy(code: str, other: Path) -> None:
    done = _python(code, other.parent)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: tokenenv needs the package 'agents'")
    assert f"is the package at {other}" in last
    assert "clean virtual environment, or uninstall the other distribution" in last


def test_the_game_needs_no_agents(tmp_path: Path) -> None:
    (tmp_path / "agents.py").write_text("raise RuntimeError('ran')\n")
    done = _python("import tokenenv; tokenenv.build_game; tokenenv.token_prune_v0", tmp_path)
    assert done.returncode == 0, done.stderr


def test_files_that_replaced_ours_are_recognised(tmp_path: Path) -> None:
    """Two distributions in one folder: the second's ``__init__`` overwrote ours."""
    (tmp_path / "tokenenv").symlink_to(ROOT / "tokenenv", target_is_directory=True)
    (tmp_path / "agents").mkdir()
    for file in (ROOT / "agents").iterdir():
        (tmp_path / "agents" / file.name).symlink_to(file)
    done = _python("import tokenenv.suite", tmp_path)
    assert done.returncode == 0, done.stderr
    init = tmp_path / "agents" / "__init__.py"
    init.unlink()
    init.write_text("")
    done = _python("import tokenenv.suite", tmp_path)
    assert f"is the package at {tmp_path / 'agents'}" in done.stderr
