"""``tokenenv show``: images of any size and mode, labelled or not; pictures, GIF, page."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from command_line import mistake
from image_folders import save
from PIL import Image

import tokenenv
from tokenenv.cli.main import main
from tokenenv.data.files import open_files
from tokenenv.game.render import enlarged
from tokenenv.measure import speed

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_SHORTEST", 0.0)


MODES = ("L", "P", "RGBA", "CMYK", "1", "I;16")


def picture(name: str, mode: str = "RGB") -> str:
    suffix = "tiff" if mode == "CMYK" else "png"
    return str(save(Path(f"{name}.{suffix}"), mode))


@pytest.mark.parametrize("mode", MODES)
def test_images_of_any_mode_and_size(mode: str) -> None:
    found = tokenenv.show("tome:r=8,blocks=2/5", [picture("one", mode)])
    assert [len(m.steps) for m in found.seen.methods.values()] == [3]
    assert found.labels == [-1]
    assert found.seen.titles == [[f"image 0: {found.files[0]}"]]


def test_the_class_is_told_by_the_folder_only_if_it_is_one() -> None:
    model = timm.create_model("deit_tiny_patch16_224", depth=1, img_size=32)
    files = [
        save(Path(place, "a.png")) for place in ("n01440764", "tench", "holiday", "7", "n99999999")
    ]
    assert open_files(list(map(str, files)), model).labels.tolist() == [0, 0, -1, -1, -1]


def test_the_picture_has_a_panel_for_each_decision_of_both_methods() -> None:
    found = tokenenv.show(
        "tome:r=8,blocks=2/5", [picture("one")], against="random:keep=0.5,blocks=3"
    )
    found.save("shown.png")
    with Image.open("shown.png") as image:
        drawn = np.asarray(image.convert("RGB"))
    large = enlarged(found.seen.pixels[0])
    height, width = large.shape[:2]
    # The untouched image stands at the start of each method's row of panels.
    at = [
        top
        for top in range(len(drawn) - height)
        if (drawn[top : top + height, 14 : 14 + width] == large).all()
    ]
    assert len(at) == 2
    first = drawn[at[0] : at[0] + height]
    # Two more panels of the first method, which is ToMe: orange lines; the second is hatched grey.
    for number, there in ((1, True), (2, True), (3, False)):
        panel = first[:, 14 + number * (width + 14) :][:, :width]
        assert (panel == (255, 140, 0)).all(2).any() == there
    panel = drawn[at[1] : at[1] + height, 14 + width + 14 :][:, :width]
    hatched = ((panel == (165, 173, 186)) | (panel == (220, 223, 228))).all(2)
    assert hatched.mean() == pytest.approx(0.5)


def test_the_animation_has_a_frame_for_each_block_of_either_method() -> None:
    found = tokenenv.show(
        "tome:r=8,blocks=2/5", [picture("a"), picture("b")], against="random:keep=0.5,blocks=3"
    )
    found.save("shown.gif")
    with Image.open("shown.gif") as image:
        assert image.n_frames == 2 * 4  # before, and after blocks 2, 3 and 5


def test_the_command_says_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "tome:r=8,blocks=2/5", picture("one"), "--out", "shown.html"]) == 0
    out = capsys.readouterr().out
    assert "one.png, tome:r=8,blocks=2/5: dense " in out and "reduced " in out
    assert "left: 48 of 64 tokens" in out and "1 MAC = 1 FLOP" in out and "ms per image" in out
    assert Path("shown.html").stat().st_size < 200_000


def test_probabilities_of_the_dense_model_are_its_own() -> None:
    found = tokenenv.show("tome:r=8", [picture("one")])
    backbone = tokenenv.load_backbone()
    source = open_files([picture("one")], backbone.model)
    with torch.inference_mode():
        expected = backbone(source.batch(torch.arange(1)).images).softmax(1)
    assert found.seen.dense == pytest.approx(expected.numpy(), abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("tome:r=8 text.png --out a.png", "'text.png' can't be read as an image"),
        ("tome:r=8 folder --out a.png", "'folder' is a folder: give the image files in it"),
        ("tome:r=8 nothing.png --out a.png", "there is no file 'nothing.png'"),
        ("tome:r=8 pipe.png --out a.png", "'pipe.png' is no regular file"),
        ("tome:r=8 one.png --out a.svg", "ends with none of .png, .gif, .html"),
        ("resize:size=4 one.png --out a.png", "takes no decisions about tokens"),
        ("tome:r=8 one.png --against resize:size=4 --out a.png", "takes no decisions about tokens"),
        ("tome:r=8 one.png --out folder/a.png/b.png", "cannot write"),
    ],
)
def test_mistakes(arguments: str, words: str, capfd: pytest.CaptureFixture[str]) -> None:
    picture("one")
    Path("text.png").write_text("not an image")
    Path("folder").mkdir()
    Path("folder/a.png").write_text("a file")
    os.mkfifo("pipe.png")
    assert words in mistake(f"show {arguments}", capfd)
    assert not Path("a.png").exists()


def test_too_many_images_are_refused() -> None:
    with pytest.raises(tokenenv.UserError, match="names 51 files: give 1 to 50"):
        tokenenv.show("tome:r=8", [picture("one")] * 51)
    with pytest.raises(tokenenv.UserError, match="names 0 files"):
        tokenenv.show("tome:r=8", [])
