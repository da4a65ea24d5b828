"""Preprocessing that a user sets: as timm does it, told, kept with what is made, and restored."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from command_line import QUICK, evaluation, mistake
from image_folders import make_folder, save
from PIL import Image
from safetensors.torch import save_file

import tokenenv
from tokenenv import Preprocessing, UserError, open_source
from tokenenv.cli.main import main
from tokenenv.ltm import load_ltm, ltm, save_ltm
from tokenenv.measure.opening import Model

pytestmark = pytest.mark.usefixtures("elsewhere")

GIVEN = {"mean": (0.2, 0.3, 0.4), "std": (0.5, 0.6, 0.7), "crop_pct": 0.7}
OWN = Preprocessing(**GIVEN, interpolation="bilinear", image_size=96)  # type: ignore[arg-type]
WNIDS = timm.data.ImageNetInfo("imagenet-1k").label_names()


def run(command: str) -> None:
    assert main(shlex.split(command)) == 0


def test_images_are_what_timm_makes_of_these_values() -> None:
    model: Any = timm.create_model("test_vit").eval()
    make_folder(Path("images"), {WNIDS[3]: 2})
    save(Path("images", WNIDS[3], "photo.jpg"))
    OWN.apply(model)
    source = open_source("images", model)
    transform = timm.data.create_transform(96, **GIVEN, interpolation="bilinear")
    found = source.batch(torch.arange(len(source))).images
    assert found.shape == (3, 3, 96, 96)
    for file, image in zip(source.files, found, strict=True):
        expected = transform(Image.open(Path("images", file)).convert("RGB"))
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-6)
    assert source.preprocessing == Preprocessing.of(model)
    assert str(source.preprocessing) == (
        "images of 96x96, bilinear, crop 0.7, mean 0.2/0.3/0.4, std 0.5/0.6/0.7"
    )


def test_a_model_of_another_image_size() -> None:
    dense: Any = timm.create_model("test_vit", num_classes=10).eval()
    save_file(dense.state_dict(), "w.safetensors")
    opened = Model("test_vit", "w.safetensors", preprocessing=OWN).open_backbone(images=False)
    assert opened.image_shape == (3, 96, 96)
    assert opened.grid == (6, 6)
    dense.set_input_size(img_size=(96, 96))
    images = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        torch.testing.assert_close(opened.model(images), dense(images))
    assert Preprocessing.of(opened.model).over(OWN) == Preprocessing.of(opened.model)


def test_what_is_given_goes_over_what_is_there() -> None:
    there = Preprocessing(mean=(0.1,), crop_pct=0.9)
    assert Preprocessing(crop_pct=0.8, std=(0.2,)).over(there) == Preprocessing(
        mean=(0.1,), std=(0.2,), crop_pct=0.8
    )
    assert Preprocessing.from_json(OWN.to_json(), "a file") == OWN


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mean": (math.nan,)}, "mean=nan"),
        ({"mean": (0.1, 0.2)}, "mean=0.1/0.2: give 1 or 3"),
        ({"std": (0.0,)}, "std=0: give 1 or 3 finite numbers above 0"),
        ({"std": (1.0, 1.0, -1.0)}, "std=1/1/-1"),
        ({"crop_pct": 0.0}, "crop_pct=0"),
        ({"crop_pct": math.nan}, "crop_pct=nan"),
        ({"crop_pct": 87.5}, "crop_pct=87.5: give more than 0, at most 1"),
        ({"interpolation": "cubic"}, "interpolation='cubic': choose from nearest, bilinear"),
        ({"image_size": 0}, "image_size=0"),
    ],
)
def test_values_out_of_range(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        Preprocessing(**values)
    assert words in str(error.value)
    with pytest.raises(UserError, match="preprocessing in 'a file'"):
        Preprocessing.from_json(values, "a file")


def test_an_image_size_that_the_model_cant_have(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="100x100 is no multiple of the model's patches of 16x16"):
        Preprocessing(image_size=100).apply(timm.create_model("test_vit"))
    words = mistake("evaluate keep-all --image-size 16", capfd)
    assert "'digits_vit' have one size: leave --image-size out" in words
    assert "interpolation='cubic'" in mistake("evaluate keep-all --interpolation cubic", capfd)
    with pytest.raises(UserError, match="restore it"):
        Preprocessing.from_json({"mena": [0.1]}, "a file")


def test_it_changes_predictions_and_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    plain = evaluation("keep-all --limit 100")
    other = evaluation("keep-all --limit 100 --mean 0.9 --std 0.1")
    told = capfd.readouterr().out.splitlines()
    assert plain["preprocessing"] == {
        "mean": [0.305], "std": [0.376], "crop_pct": 1.0, "interpolation": "bilinear",
        "image_size": [8, 8],
    }  # fmt: skip
    assert other["preprocessing"] == plain["preprocessing"] | {"mean": [0.9], "std": [0.1]}
    assert other["top1_dense"] < plain["top1_dense"]
    assert [line for line in told if "preprocessing" in line] == [
        "  preprocessing: images of 8x8, bilinear, crop 1, mean 0.305, std 0.376",
        "  preprocessing: images of 8x8, bilinear, crop 1, mean 0.9, std 0.1",
    ]


def test_a_run_keeps_it_and_all_that_is_made_of_the_run(
    capfd: pytest.CaptureFixture[str],
) -> None:
    run(f"{QUICK} --mean 0.5 --out a")
    run(f"{QUICK} --out b")
    for file in ("config.json", "report.json"):
        assert json.loads(Path("a", file).read_text())["preprocessing"]["mean"] == [0.5]
    words = mistake(f"{QUICK} --mean 0.4 --out a --resume", capfd)
    assert "cannot resume 'a' with mean=0.4: it was started with mean=0.5" in words
    assert evaluation("a --limit 9")["preprocessing"]["mean"] == [0.5]
    assert evaluation("a --limit 9 --model digits_vit")["preprocessing"]["mean"] == [0.5]
    assert evaluation("a --limit 9 --mean 0.1")["preprocessing"]["mean"] == [0.1]
    run("compress a --out fast")
    assert json.loads(Path("fast", "compressed.json").read_text())["preprocessing"]["mean"] == [0.5]
    fast: Any = tokenenv.load_compressed("fast")
    assert timm.data.resolve_model_data_config(fast)["mean"] == (0.5,)
    assert evaluation("fast --limit 9")["preprocessing"]["mean"] == [0.5]
    words = mistake("compare a b --limit 9 --batch 1", capfd)
    assert "'a' and 'b' were made with different preprocessing" in words
    capfd.readouterr()
    run("compare a b --limit 9 --batch 1 --rounds 1 --mean 0.5")
    assert "\npreprocessing: images of 8x8, bilinear, crop 1, mean 0.5, std 0.376\n" in (
        capfd.readouterr().out
    )
    again = mistake("compare a --limit 9 --batch 1 --rounds 1 --mean 0.4", capfd)
    assert "has preprocessing 'images of 8x8, bilinear, crop 1, mean 0.5" in again


def test_a_model_with_ltm_blocks_keeps_it() -> None:
    model = tokenenv.load_backbone().model
    model.requires_grad_(False)
    Preprocessing(mean=(0.5,)).apply(model)
    save_ltm(ltm(model), "merged")
    assert Preprocessing.of(load_ltm("merged").model).mean == (0.5,)
    assert evaluation("merged --limit 9")["preprocessing"]["mean"] == [0.5]


def test_a_fine_tuned_backbone_has_it_too() -> None:
    run(
        "train mstm --images 40 --set updates=1 --set evaluate_every=1 --set batch=4 "
        "--mean 0.5 --out tuned"
    )
    run("compress tuned --out fast")
    assert json.loads(Path("fast", "compressed.json").read_text())["preprocessing"]["mean"] == [0.5]
