"""What a saved model says of itself: preprocessing, class names, method, measured numbers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from command_line import mistake
from image_folders import make_folder, save
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.utils import CheckpointSaver
from torch.testing import assert_close

import tokenenv
from tokenenv import Preprocessing, UserError
from tokenenv.cli.main import main

pytestmark = pytest.mark.usefixtures("elsewhere")

NAMES = [f"sort {number}" for number in range(1, 21)]
"""timm's training script numbers "sort 2" before "sort 10", unlike Python's sorting."""


def checkpoint(folder: Path, **arguments: Any) -> str:
    """What timm's training script writes of a model of 20 classes, by timm's own code."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=20)
    args = argparse.Namespace(model="test_vit", mean=None, interpolation="", **arguments)
    places = {"checkpoint_dir": str(folder), "recovery_dir": str(folder)}
    saver = CheckpointSaver(model, torch.optim.SGD(model.parameters(), 0.1), args=args, **places)
    saver.save_checkpoint(0, metric=90.0)
    return str(folder / "model_best.pth.tar")


def test_a_checkpoint_of_timms_script_becomes_an_artefact_by_one_command() -> None:
    weights = checkpoint(Path.cwd(), crop_pct=0.8, std=[0.2, 0.2, 0.3])
    make_folder(Path("val"), dict.fromkeys(NAMES, 1))
    assert main(["compress", "tome:r=8", "--weights", weights, "--data", "val", "--out", "f"]) == 0
    fast = tokenenv.load_compressed("f")
    assert fast.backbone.architecture == "test_vit" and fast.classes == NAMES
    assert fast.method == "tome:r=8" and fast.measured["images"] == 20
    used = fast.preprocess.used
    assert used.crop_pct == 0.8 and used.std == (0.2, 0.2, 0.3) and used.interpolation == "bicubic"

    files = sorted(Path("val").rglob("*.png"))
    found = fast.predict(files, top=3, batch=7)
    with torch.inference_mode():
        pixels = torch.stack([fast.preprocess(Image.open(file)) for file in files])
        chances = fast(pixels).softmax(1)
    best = chances.argmax(1).tolist()
    assert [each.name for each in found] == [NAMES[index] for index in best]
    assert [each.indices[0] for each in found] == best
    assert_close(torch.tensor([each.probability for each in found]), chances.amax(1))
    right = [each.name == file.parent.name for each, file in zip(found, files, strict=True)]
    assert fast.measured["top1"] == 100 * sum(right) / 20
    assert fast.measured["gmacs"] < fast.measured["gmacs_dense"]


def test_preprocess_is_timms_transform() -> None:
    model = timm.create_model("test_vit")
    Preprocessing(crop_pct=0.7, interpolation="bilinear", mean=(0.1, 0.2, 0.3)).apply(model)
    tokenenv.compress(model, "norm:keep=0.5").save("fast")
    image = Image.open(save(Path("a.png")))
    config = resolve_model_data_config(model)
    expected = create_transform(**config, is_training=False)(image)
    assert_close(tokenenv.load_compressed("fast").preprocess(image), expected, atol=1e-6, rtol=0)


def test_class_names_of_a_file(capfd: pytest.CaptureFixture[str]) -> None:
    weights = checkpoint(Path.cwd())
    command = f"compress norm:keep=0.5 --weights {weights} --classes names.txt --out"
    assert "cannot read classes 'names.txt'" in mistake(f"{command} a", capfd)
    Path("names.txt").write_text("one\ntwo\n")
    assert "2 class names (2 different) for a head of 20 outputs" in mistake(f"{command} a", capfd)
    names = [f"name {number}" for number in range(20)]
    Path("names.txt").write_text("\n".join(names) + "\n\n")
    assert main([*command.split(), "fast"]) == 0
    fast = tokenenv.load_compressed("fast")
    assert fast.classes == names
    assert tokenenv.open_source(
        str(make_folder(Path("some"), {"name 3": 1, "Name_11": 2})), fast.model
    ).labels.tolist() == [11, 11, 3]


def test_an_older_artefact_loads() -> None:
    tokenenv.compress(timm.create_model("test_vit"), "norm:keep=0.5").save("fast")
    path = Path("fast/compressed.json")
    config = json.loads(path.read_text())
    for name in ("preprocessing", "classes", "method", "measured", "tokenenv"):
        del config[name]
    path.write_text(json.dumps(config))
    fast = tokenenv.load_compressed("fast")
    assert fast.method == "" and fast.measured == {} and len(fast.classes or ()) == 1000


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("classes", ["a", "b"], "2 class names"),
        ("classes", "many", "'classes' is 'many'"),
        ("classes", [1, 2], "'classes' is"),
        ("measured", [], "'measured' is []"),
        ("preprocessing", {"crop_pct": 7}, "crop_pct=7"),
        ("preprocessing", {"code": "x"}, "preprocessing in"),
    ],
)
def test_what_an_artefact_says_is_checked(field: str, value: Any, words: str) -> None:
    tokenenv.compress(timm.create_model("test_vit"), "norm:keep=0.5").save("fast")
    path = Path("fast/compressed.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(UserError) as error:
        tokenenv.load_compressed("fast")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_image_is_named() -> None:
    fast = tokenenv.compress(timm.create_model("test_vit"), "norm:keep=0.5")
    good = save(Path("good.png"))
    Path("bad.png").write_text("no image")
    for file in ("bad.png", "gone.png", "."):
        with pytest.raises(UserError, match=rf"'{file}' is no image that can be read .*: leave"):
            fast.predict([good, file])
    assert fast.predict([]) == []
    (found,) = fast.predict(good)
    assert found.file == "good.png" and 0 < found.probability <= 1
    with pytest.raises(UserError, match="top"):
        fast.predict(good, top=0)


def test_arguments_of_a_checkpoint_that_cannot_be_are_one_line() -> None:
    weights = checkpoint(Path.cwd(), crop_pct=3.0)
    with pytest.raises(UserError, match=r"preprocessing in the arguments that .* crop_pct=3"):
        tokenenv.compress(None, "norm:keep=0.5", weights=weights)
    fast = tokenenv.compress(
        "test_vit", "norm:keep=0.5", weights=checkpoint(Path.cwd(), crop_pct=0.6),
        preprocessing=Preprocessing(crop_pct=0.5),
    )  # fmt: skip
    assert fast.preprocess.used.crop_pct == 0.5  # the user's word counts


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("preprocessing", {"mean": ["x"]}, "preprocessing in '.*compressed.json': 'mean' is"),
        ("preprocessing", {"image_size": True}, "'image_size' is True"),
        ("preprocessing", {"colour": 1}, "unknown field 'colour'"),
        ("classes", ["only one"], "'classes' in '.*compressed.json': 1 class names"),
    ],
)
def test_a_wrong_value_is_named_with_its_field(
    field: str, value: Any, words: str, tmp_path: Path
) -> None:
    model = tokenenv.load_backbone("digits_vit").model
    tokenenv.compress(model, "tome:r=4").save(tmp_path / "fast")
    path = tmp_path / "fast" / "compressed.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(UserError, match=words):
        tokenenv.load_compressed(tmp_path / "fast")
