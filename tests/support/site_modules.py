"""The modules in docs/, which make pages, pictures and notebooks; no package holds them."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


def site_module(name: str) -> ModuleType:
    """``docs/NAME.py``, imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DOCS)
        return importlib.import_module(name)
