"""Closed and full outputs, interrupts and too little memory cost no work and no traceback."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from command_line import mistake, write_digits

import tokenenv
from tokenenv.cli.main import main
from tokenenv.cli.streams import SturdyStream
from tokenenv.errors import check_interrupt

pytestmark = pytest.mark.usefixtures("elsewhere")
ROOT = Path(__file__).parents[2]
full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line in a shell in which ``$T`` is this package's command."""
    told = {"T": f"{sys.executable} -m tokenenv", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["sh", "-c", line],
        env=os.environ | told | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@full
@pytest.mark.parametrize(
    ("where", "status"), [("2>&-", 0), (">&-", 0), ("2> /dev/full", 0), ("> /dev/full", 2)]
)
def test_the_work_is_done_where_nothing_can_be_printed(where: str, status: int) -> None:
    ran = shell(f"$T evaluate keep-all --limit 4 --json r.json {where}")
    assert ran.returncode == status, ran.stderr
    assert len(json.loads(Path("r.json").read_text())["predictions"]) == 4
    if status:
        assert ran.stderr.count("\n") == 1
        assert "standard output can't be written to (No space left on device)" in ran.stderr
    else:
        assert not ran.stderr


class Broken(io.StringIO):
    """Fails after the first line."""

    def write(self, text: str) -> int:
        if self.getvalue():
            raise OSError(28, "No space left on device")
        return super().write(text)


def test_a_stream_that_fails_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Broken()
    sturdy = SturdyStream(stream)
    print("a", end="", file=sturdy)
    for _ in range(3):
        print("b", end="", file=sturdy, flush=True)
    assert stream.getvalue() == "a" and sturdy.lost is not None and sturdy.lost.errno == 28
    gone = io.StringIO()
    monkeypatch.setattr(gone, "write", lambda text: (_ for _ in ()).throw(BrokenPipeError()))
    with pytest.raises(BrokenPipeError):
        SturdyStream(gone).write("a")


def test_a_character_that_the_terminal_lacks_is_escaped() -> None:
    held = io.BytesIO()
    sturdy = SturdyStream(io.TextIOWrapper(held, "ascii"))
    print("½ \udce9", file=sturdy, flush=True)
    assert held.getvalue() == b"\\xbd \\udce9\n"


def test_images_whose_names_are_not_utf_8() -> None:
    write_digits(Path("images"), 12)
    odd = Path("images", "0", os.fsdecode(b"\xff.png"))
    odd.parent.mkdir(exist_ok=True)
    odd.write_bytes(b"no image")
    line = "$T evaluate keep-all --data images --json r.json"
    ran = shell(line, PYTHONIOENCODING="utf-8:strict")
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr and "\\udc" in ran.stdout
    assert json.loads(Path("r.json").read_text())["skipped"] == 1


def interrupted(*args: Any, **kwargs: Any) -> Any:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt as interrupt:
        raise SystemError("returned a result with an exception set") from interrupt


@pytest.mark.parametrize("system", ["mstm", "rl4evit"])
def test_ctrl_c_while_weights_are_loaded_is_no_mistake(
    system: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    create = timm.create_model

    def create_model(*args: Any, pretrained: bool = False, **kwargs: Any) -> Any:
        return interrupted() if pretrained else create(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", create_model)
    assert main(["train", system]) == 130
    assert capfd.readouterr().err.strip() == "tokenenv: interrupted"
    with pytest.raises(KeyboardInterrupt):
        tokenenv.load_backbone()
    check_interrupt(ValueError("no interrupt"))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("bench keep-all --threads 100000", "threads=100000: more threads than this machine's"),
        ("bench keep-all --rounds 1000000000", "rounds=1000000000 is no whole number from 1 to 1"),
        ("compare keep-all --rounds 1000000000", "rounds=1000000000 is no whole number"),
        ("bench keep-all --batch 1,999999999", "batch=999999999 is no whole number from 1 to 655"),
        ("compare keep-all --batch 999999999", "batch=999999999 is no whole number from 1 to 655"),
        ("evaluate keep-all --batch 999999999", "batch=999999999 is no whole number from 1 to 65"),
    ],
)
def test_numbers_beyond_reason(command: str, words: str, capfd: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    assert words in mistake(command, capfd)
    assert torch.get_num_threads() == before


def test_too_little_memory_is_one_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*args: Any, **kwargs: Any) -> Any:
        return torch.empty(2**60)

    monkeypatch.setattr("tokenenv.api.evaluate.evaluate", too_large)
    assert "the memory is too small" in mistake("evaluate keep-all", capfd)


def test_a_file_that_fails_underway_is_one_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise OSError(5, "Input/output error", "disk.bin")

    monkeypatch.setattr("tokenenv.api.evaluate.evaluate", fails)
    assert "'disk.bin' can't be used (Input/output error)" in mistake("evaluate keep-all", capfd)
