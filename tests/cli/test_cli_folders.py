"""The command line on folders of images, and stopped by Ctrl-C."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from command_line import QUICK, evaluation, mistake, write_digits

from agents.learners.mappo import MAPPO
from agents.training.trainer import CHECKPOINT
from tokenenv.cli.main import main
from tokenenv.storage import read_tensors

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 digits as a folder of images."""
    root = tmp_path_factory.mktemp("images") / "digits"
    write_digits(root, 40)
    return root


def test_a_folder_is_evaluated_by_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = evaluation(f"keep-all --data {folder}")
    assert (report["data"], report["images"]) == ("digits", 40)
    assert report["top1"] >= 90
    for row in report["predictions"]:
        assert (folder / row["file"]).is_file()
        assert row["file"].startswith(f"{row['label']}/")


@pytest.mark.parametrize("command", ["evaluate", "bench", "compare", "compress --out fast"])
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("nonsense", "neither a run folder nor a policy"),
        ("tome", "needs r="),
        ("rl4evit-deit_tiny", "not on 'vit_medium_patch16_gap_256'"),
    ],
)
def test_the_method_is_checked_before_weights_are_read(
    command: str, what: str, words: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images = "" if "compress" in command or command == "bench" else f"--data {folder}"
    model = "--model vit_medium_patch16_gap_256"
    for weights in ("--weights gone.safetensors", ""):
        assert words in mistake(f"{command} {what} {model} {images} {weights}", capfd)
    if what == "tome":  # it has no class token
        needs = mistake(f"{command} cls-attention:keep=0.7 {model} {images}", capfd)
        assert "class token" in needs


def test_limit_takes_at_most_so_many(folder: Path) -> None:
    assert evaluation(f"keep-all --data {folder} --limit 15")["images"] == 15
    assert evaluation(f"keep-all --data {folder} --limit 5000")["images"] == 40


def test_unreadable_images_are_skipped_and_counted(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_digits(Path("images"), 40)
    Path("images/3/bad.png").write_bytes(b"no picture")
    Path("images/4/worse.png").write_bytes(b"")
    report = evaluation("keep-all --data images")
    assert (report["images"], report["skipped"]) == (40, 2)
    assert not [row for row in report["predictions"] if "bad" in row["file"]]
    assert (
        "skipped 2 unreadable images of images, for example '3/bad.png'" in capfd.readouterr().out
    )

    command = QUICK.replace("--images 60", "--data images")
    # In batches of 40 every image is drawn; those that nobody draws are not looked at.
    assert main([*command.split(), "--set", "batch=40", "--out", "r"]) == 0
    assert "skipped 2 unreadable images" in capfd.readouterr().out
    assert json.loads(Path("r/report.json").read_text())["images"] > 0


def test_a_first_ctrl_c_keeps_everything(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [*QUICK.replace("--images 60", f"--data {folder}").split(), "--out", "r"]
    interrupt_update(monkeypatch, number=2, times=1)
    assert main(command) == 130
    report = json.loads(Path("r/report.json").read_text())
    assert (report["updates"], report["stopped_early"]) == (2, True)
    for name in ("policy.safetensors", "config.json", "curve.png", "tokens.png", CHECKPOINT):
        assert Path("r", name).is_file()
    assert evaluation("r --limit 10")["images"] == 10

    assert main([*command, "--resume"]) == 0
    report = json.loads(Path("r/report.json").read_text())
    assert (report["updates"], report["stopped_early"]) == (3, False)
    assert report["evaluated_on_held_back"]


def test_a_second_ctrl_c_ends_it_and_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_update(monkeypatch, number=2, times=2)
    assert main([*QUICK.split(), "--out", "r"]) == 130
    assert not Path("r/report.json").exists()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "tokenenv: interrupted; the same command with --out r --resume goes on"
    assert read_tensors(Path("r", CHECKPOINT))[1]["done"] == 1


def interrupt_update(monkeypatch: pytest.MonkeyPatch, number: int, times: int) -> None:
    """Press Ctrl-C in the ``number``-th update from now on."""
    update, calls = MAPPO.update, iter(range(1, 99))

    def interrupted(self: MAPPO) -> dict[str, float]:
        if next(calls) == number:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return update(self)

    monkeypatch.setattr(MAPPO, "update", interrupted)
