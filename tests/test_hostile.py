"""Every file that the package reads, changed at random: it is read, or refused in one line.

Never a traceback, never a connection, never code run, never a number that is not finite.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile import EVIL, READERS, mutated, write_all
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenenv.artefact import Unfit, parse_json
from tokenenv.errors import UserError


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("written")
    write_all(root)
    return root


# --- the property ----------------------------------------------------------------------------
class Connected(BaseException):
    """Not an Exception: no reader can take it for a damaged file."""


def refuse(*args: Any, **kwargs: Any) -> Any:
    raise Connected(str(args)[:100])


def check(kind: str, written: Path, place: Path, draw: Callable[[Any], Any]) -> None:
    """Change one file of an artefact and read it."""
    read, patterns = READERS[kind]
    if place.exists():
        shutil.rmtree(place)
    shutil.copytree(written / kind, place)
    (place / EVIL).write_text(f"open({str(place / 'ran')!r}, 'w')\nclass Evil: pass\n")
    file = draw(st.sampled_from(sorted(place.glob(draw(st.sampled_from(patterns))))))
    file.write_bytes(mutated(file, draw))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(socket, "socket", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        try:
            read(place)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
    assert not (place / "ran").exists()


EXAMPLES = {
    "run": 30, "tuned": 12, "checkpoint": 40, "tuning": 20, "compressed": 20, "ltm": 15,
    "comparison": 8, "suite": 40, "weights": 15, "pickle": 15,
}  # fmt: skip
"""How often a file of each kind is changed: most often where reading it takes least."""


def changes(kind: str, count: int, written: Path, place: Path) -> None:
    """:func:`check` for ``count`` changes, the same in every run."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]

    @settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=slow)
    @given(data=st.data())
    def hold(data: st.DataObject) -> None:
        check(kind, written, place, data.draw)

    hold()


@pytest.mark.parametrize("kind", READERS)
def test_a_changed_file_is_read_or_refused(kind: str, written: Path, tmp_path: Path) -> None:
    assert sum(EXAMPLES.values()) >= 200
    changes(kind, EXAMPLES[kind], written, tmp_path / "changed")


@pytest.mark.slow
@pytest.mark.parametrize("kind", READERS)
def test_many_changed_files_are_read_or_refused(kind: str, written: Path, tmp_path: Path) -> None:
    changes(kind, 10 * EXAMPLES[kind], written, tmp_path / "changed")


@pytest.mark.parametrize("kind", READERS)
def test_unchanged_it_is_read(
    kind: str, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(written / kind, tmp_path / kind)
    monkeypatch.chdir(tmp_path / kind)
    READERS[kind][0](tmp_path / kind)


# --- known attacks ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("section", "key", "value", "reason"),
    [
        ("options", "pretrained", True, "unknown field 'pretrained'"),
        ("options", "pretrained_cfg_overlay", {"hf_hub_id": "a/b"}, "unknown field"),
        ("options", "checkpoint_path", "/etc/passwd", "unknown field 'checkpoint_path'"),
        ("options", "depth", 100_000, "unknown field 'depth'"),
        ("options", "img_size", [10**6, 10**6], "'img_size' is [1000000, 1000000], not"),
        ("options", "in_chans", True, "'in_chans' is True, not a whole number from 1 to 1024"),
        ("", "model", "hf-hub:a/b", "unknown model 'hf-hub:a/b'"),
        ("", "model", "local-dir:/etc", "unknown model 'local-dir:/etc'"),
        ("", "dtype", "int8", "'dtype' is 'int8', not one of 'float32'"),
    ],
)
def test_only_the_options_that_are_saved_reach_timm(
    written: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    section: str,
    key: str,
    value: Any,
    reason: str,
) -> None:
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for kind, name in (("ltm", "ltm.json"), ("compressed", "compressed.json")):
        shutil.copytree(written / kind, tmp_path / kind)
        config = json.loads((tmp_path / kind / name).read_text())
        (config[section] if section else config)[key] = value
        (tmp_path / kind / name).write_text(json.dumps(config))
        monkeypatch.chdir(tmp_path / kind)
        with pytest.raises(UserError, match=re.escape(reason)):
            READERS[kind][0](tmp_path / kind)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 200 + "]" * 200, "nested deeper than 100"),
        ("[" * 100_000, "nested deeper than 100"),
        ("[NaN]", "NaN is no finite number"),
        ("[1e999]", "1e999 is no finite number"),
        ("9" * 5000, "99999999999999999999 is out of the range of whole numbers"),
        ("{", "no JSON, JSONDecodeError"),
        (b"\xff\xfe\xfa", "no JSON, UnicodeDecodeError"),
    ],
)
def test_json_has_limits(text: str | bytes, reason: str) -> None:
    with pytest.raises(Unfit, match=reason):
        parse_json(text)
