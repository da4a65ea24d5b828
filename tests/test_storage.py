"""Writing files and folders: what exists, what is written at once, who may write."""

from __future__ import annotations

import multiprocessing
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from command_line import QUICK, mistake

from tokenenv.cli.main import main
from tokenenv.errors import UserError
from tokenenv.storage import LOCK, new_folder, own_folder, write_bytes, write_json

fifos = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on this system")


# --- what exists -----------------------------------------------------------------------------
@fifos
def test_what_is_no_regular_file_is_written_to_and_stays(tmp_path: Path) -> None:
    path, got = tmp_path / "fifo", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: got.append(path.read_bytes()), daemon=True)
    reader.start()
    write_json(path, {"a": 1})
    assert stat.S_ISFIFO(path.stat().st_mode)
    reader.join(10)
    assert got == [b'{\n  "a": 1\n}\n']


@pytest.mark.parametrize("name", ["null", "link"])
def test_a_device_stays_a_device(tmp_path: Path, name: str) -> None:
    """A node like ``/dev/null``, but one whose replacement would do no harm."""
    try:
        os.mknod(tmp_path / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        (tmp_path / "null").write_bytes(b"")
    except (AttributeError, OSError) as error:
        pytest.skip(f"no device can be made here: {error}")
    (tmp_path / "link").symlink_to("null")
    write_bytes(tmp_path / name, b"gone")
    assert stat.S_ISCHR((tmp_path / "null").stat().st_mode)
    assert (tmp_path / "link").is_symlink()


def test_results_can_go_to_dev_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("/dev/null")
    assert main(["evaluate", "keep-all", "--limit", "2", "--json", "link"]) == 0
    assert Path("link").is_symlink() and stat.S_ISCHR(Path("link").stat().st_mode)


def test_a_link_stays_and_what_it_names_is_written(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    for target in ("real/there.json", "real/new.json"):
        link = tmp_path / f"link-to-{Path(target).name}"
        link.symlink_to(target)
        if "there" in target:
            (tmp_path / target).write_text("old")
        write_bytes(link, b"new")
        assert link.is_symlink()
        assert (tmp_path / target).read_bytes() == b"new"
    assert {path.name for path in (tmp_path / "real").iterdir()} == {"there.json", "new.json"}


def test_a_link_to_itself_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(UserError, match=r"cannot write '.*round' \(.*choose another place"):
        write_bytes(tmp_path / "round", b"")
    assert (tmp_path / "round").is_symlink()


# --- at once ---------------------------------------------------------------------------------
def write_often(path: Path, letter: bytes) -> None:
    for _ in range(40):
        write_bytes(path, letter * 200_000)


def test_concurrent_writers_leave_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    start = multiprocessing.get_context("fork")
    writers = [start.Process(target=write_often, args=(path, bytes([65 + n]))) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    content = path.read_bytes()
    assert content == content[:1] * 200_000
    assert list(tmp_path.iterdir()) == [path]


# --- one writer ------------------------------------------------------------------------------
HOLD = """
import sys
from pathlib import Path
from tokenenv.storage import own_folder
with own_folder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The folder ``r``, which another process writes to."""
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-c", HOLD, "r"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        yield other
        other.kill()


def test_a_second_writer_of_a_folder_is_refused(
    held: subprocess.Popen[bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    for command in (
        f"{QUICK} --out r",
        f"{QUICK} --out r --resume",
        "compare keep-all --limit 2 --out r",
        "suite run digits-prune-v0 --learner random --out r",
    ):
        said = mistake(command, capfd)
        assert "another process is writing to 'r': wait until it ends, or choose" in said


def test_a_killed_process_locks_nothing(held: subprocess.Popen[bytes]) -> None:
    held.kill()
    held.wait()
    assert Path("r", LOCK).exists()
    with own_folder(Path("r")):
        pass
    assert not Path("r").exists() or not list(Path("r").iterdir())


def test_the_lock_goes_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["compare", "keep-all", "--limit", "2", "--out", "r"]
    for _ in range(2):
        assert main([*words, "--batch", "1", "--rounds", "1"]) == 0
        assert not Path("r", LOCK).exists()


# --- new folders -----------------------------------------------------------------------------
def test_a_new_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with pytest.raises(ZeroDivisionError), new_folder(target) as place:
        (place / "half").touch()
        raise ZeroDivisionError
    assert not list((tmp_path / "a").iterdir())
    with new_folder(target) as place:
        (place / "file").touch()
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["file"]
    assert [path.name for path in target.parent.iterdir()] == ["b"]


def test_where_no_new_folder_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for target, words in (
        (tmp_path, "exists already: choose another folder"),
        (tmp_path / "file", "exists already: choose another folder"),
        (tmp_path / "file" / "below", "choose another"),
    ):
        with pytest.raises(UserError, match=words), new_folder(target):
            pytest.fail("it was given")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_link_to_an_empty_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with new_folder(tmp_path / "link") as place:
        (place / "file").touch()
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "file").exists()
