"""Fixtures that more than one test file needs."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from command_line import QUICK
from own_methods import METHODS
from safetensors.torch import save_file
from torch import nn

import tokenenv.vit.digits  # noqa: F401  (registers digits_vit with timm)
from agents.policies import POLICIES
from tokenenv.cli.main import main
from tokenenv.game.rules import RULES
from tokenenv.reducers import REDUCERS

# A shell starts what runs in its background deaf to Ctrl-C, which tests raise.
signal.signal(signal.SIGINT, signal.default_int_handler)

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


@pytest.fixture(scope="module")
def digits_model() -> nn.Module:
    return timm.create_model("digits_vit")


@pytest.fixture(scope="module")
def imagenet_model() -> nn.Module:
    return timm.create_model("deit_tiny_patch16_224", depth=1, img_size=32)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has a current folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short training run."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main([*QUICK.split(), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of digits_vit that know nothing."""
    path = tmp_path_factory.mktemp("weights") / "untrained.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(timm.create_model("digits_vit").state_dict(), path)
    return path


@pytest.fixture
def one_thread():  # type: ignore[no-untyped-def]
    """Sums in the same order, whatever else the machine does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tables of times lie in a folder of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENENV_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def own_methods(elsewhere: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``methods.py`` and ``own_module.py`` in the current folder, and registries as they were."""
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    monkeypatch.setattr("sys.path", list(sys.path))
    known = [(registry, dict(registry)) for registry in (REDUCERS, POLICIES, RULES)]
    for name in ("methods.py", "own_module.py"):
        Path(name).write_text(METHODS)
    yield
    sys.modules.pop("own_module", None)
    for registry, before in known:
        registry.clear()
        registry.update(before)
