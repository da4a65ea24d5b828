"""Whether ``agents`` is the package that comes with this one, or another of that name."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

MARK = 'DISTRIBUTION = "tokenenv"'
"""A line of our ``agents/__init__.py``."""


def require_own_agents() -> None:
    """Refuse to go on where ``import agents`` would find another distribution's package.

    Other distributions have a package named ``agents`` too. It may stand earlier on ``sys.path``,
    or its files may have replaced ours in the same folder. Nothing of it is run to find that out.
    Every room above ``agents`` that imports it calls this in its ``__init__``.

    Raises:
        ImportError: there is none, or another; the message names its path and the remedy.
    """
    spec = find_spec("agents")
    found = "there is no package 'agents'"
    if spec is not None:
        if spec.origin is not None and _is_own(Path(spec.origin)):
            return
        folders = spec.submodule_search_locations
        found = f"'agents' is the package at {folders[0] if folders else spec.origin}"
    raise ImportError(
        f"tokenenv needs the package 'agents' that is installed with it, but {found}: install "
        "tokenenv into a clean virtual environment, or uninstall the other distribution (or "
        "rename that folder) and reinstall tokenenv",
        name="agents",
    )


def _is_own(file: Path) -> bool:
    try:
        return MARK in file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return False
