"""Fixtures that more than one test file needs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores already
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real weights and images; the test skips where there is none."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("TOKENENV_DATA", default))
    if not (folder / "weights").is_dir():
        pytest.skip(f"no real weights and images at {folder}; set TOKENENV_DATA to their folder")
    return folder
