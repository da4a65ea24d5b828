from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from image_folders import corrupt, make_folder, save
from PIL import Image
from torch import nn

import tokenenv.vit.digits  # noqa: F401  registers digits_vit
from tokenenv.data import ImageSource, open_source, pixels
from tokenenv.errors import UserError

WNIDS = timm.data.ImageNetInfo("imagenet-1k").label_names()


def head(outputs: int, **cfg: object) -> nn.Module:
    """The least a model must be for its head to be asked."""
    model = nn.Module()
    model.num_classes = outputs
    model.pretrained_cfg = cfg
    return model


def all_of(source: ImageSource) -> torch.Tensor:
    return torch.arange(len(source))


# --- reading -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 64])
def test_preprocessing_is_timms_own(tmp_path: Path, size: int | None) -> None:
    options = {} if size is None else {"img_size": size}
    model = timm.create_model("vit_tiny_patch16_224", depth=1, **options)
    make_folder(tmp_path, {WNIDS[3]: 2, WNIDS[7]: 3})
    save(tmp_path / WNIDS[3] / "photo.jpg")
    source = open_source(str(tmp_path), model)
    check_against_timm(source, tmp_path, model, size or 224)


def check_against_timm(source: ImageSource, root: Path, model: nn.Module, size: int) -> None:
    config = timm.data.resolve_model_data_config(model) | {"input_size": (3, size, size)}
    transform = timm.data.create_transform(**config, is_training=False)
    batch = source.batch(all_of(source))
    assert batch.images.dtype == torch.float32
    assert len(batch.images) == len(source.files)
    for file, image in zip(source.files, batch.images, strict=True):
        expected = transform(Image.open(root / file).convert("RGB"))
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-6)


def test_preprocessing_of_real_images_is_timms_own(real_data: Path) -> None:
    model = timm.create_model("deit_tiny_patch16_224", depth=1)
    root = real_data / "imagenet_val_300"
    source = open_source(str(root), model, limit=6, seed=1)
    check_against_timm(source, root, model, 224)
    assert source.labels.tolist() == [WNIDS.index(file.split("/")[0]) for file in source.files]


def test_real_images_are_recognised(real_data: Path) -> None:
    """Labels and preprocessing fit the weights: chance would be 1 in 1000."""
    weights = real_data / "weights" / "deit_tiny_patch16_224.safetensors"
    model = timm.create_model("deit_tiny_patch16_224", checkpoint_path=str(weights)).eval()
    source = open_source(str(real_data / "imagenet_val_300"), model, limit=16)
    batch = source.batch(all_of(source))
    with torch.inference_mode():
        right = (model(batch.images).argmax(1) == batch.labels).sum().item()
    assert right >= 10


def test_a_batch_keeps_the_asked_order(tmp_path: Path, digits_model: nn.Module) -> None:
    source = open_source(str(make_folder(tmp_path, {"3": 2, "8": 2})), digits_model)
    assert source.files == ["3/00.png", "3/01.png", "8/00.png", "8/01.png"]
    assert source.labels.tolist() == [3, 3, 8, 8]
    batch, straight = source.batch(torch.tensor([2, 0, 2])), source.batch(all_of(source))
    assert batch.labels.tolist() == [8, 3, 8]
    assert batch.index.tolist() == [2, 0, 2]
    assert torch.equal(batch.images, straight.images[[2, 0, 2]])


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("cmyk.jpg", "CMYK"),
        ("grey.jpg", "L"),
        ("palette.png", "P"),
        ("bits.png", "1"),
        ("alpha.png", "RGBA"),
        ("greyalpha.png", "LA"),
        ("sixteen.png", "I;16"),
        ("thirtytwo.tiff", "I"),
        ("float.tiff", "F"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_every_mode_is_read(
    tmp_path: Path, imagenet_model: nn.Module, name: str, mode: str
) -> None:
    save(tmp_path / WNIDS[0] / name, mode)
    source = open_source(str(tmp_path), imagenet_model)
    assert source.batch(all_of(source)).images.shape == (1, 3, 32, 32)
    assert not source.skipped


@pytest.mark.filterwarnings("error")
def test_palette_with_transparency_keeps_its_colours(
    tmp_path: Path, imagenet_model: nn.Module
) -> None:
    opaque = Image.open(save(tmp_path / WNIDS[0] / "a.png", mode="P"))
    opaque.save(tmp_path / WNIDS[0] / "b.png", transparency=bytes(range(256)))
    source = open_source(str(tmp_path), imagenet_model)
    first, second = source.batch(all_of(source)).images
    assert torch.equal(first, second)


def test_sixteen_bits_keep_their_contrast(tmp_path: Path, imagenet_model: nn.Module) -> None:
    ramp = np.tile(np.arange(0, 256, 4, dtype=np.uint16), (64, 1))
    folder = tmp_path / WNIDS[0]
    folder.mkdir()
    Image.fromarray(ramp.astype(np.uint8)).save(folder / "eight.png")
    Image.fromarray(ramp * 257).save(folder / "sixteen.png")
    source = open_source(str(tmp_path), imagenet_model)
    eight, sixteen = source.batch(all_of(source)).images
    assert torch.equal(eight, sixteen)
    assert eight.std() > 0.5


@pytest.mark.parametrize("size", [(200, 10), (10, 200), (1, 1)])
def test_odd_shapes_are_read(
    tmp_path: Path, imagenet_model: nn.Module, size: tuple[int, int]
) -> None:
    (tmp_path / WNIDS[0]).mkdir()
    Image.new("RGB", size).save(tmp_path / WNIDS[0] / "odd.png")
    source = open_source(str(tmp_path), imagenet_model)
    assert source.batch(all_of(source)).images.shape == (1, 3, 32, 32)


def test_grey_models_read_colour_images(tmp_path: Path, digits_model: nn.Module) -> None:
    save(tmp_path / "4" / "white.png", shade=255)
    images = open_source(str(tmp_path), digits_model).batch(torch.tensor([0])).images
    mean, std = (digits_model.pretrained_cfg[key][0] for key in ("mean", "std"))
    torch.testing.assert_close(images, torch.full((1, 1, 8, 8), (1 - mean) / std))


def test_a_model_of_five_channels_is_an_error(tmp_path: Path) -> None:
    model = timm.create_model("deit_tiny_patch16_224", depth=1, in_chans=5)
    make_folder(tmp_path, {WNIDS[0]: 1})
    with pytest.raises(UserError, match="5 colour channels"):
        open_source(str(tmp_path), model)


# --- unreadable files ----------------------------------------------------------------------


def test_unreadable_files_are_left_out_and_recorded_once(
    tmp_path: Path, digits_model: nn.Module
) -> None:
    bad = corrupt(make_folder(tmp_path, {"0": 3, "1": 2}))
    source = open_source(str(tmp_path), digits_model)
    assert len(source) == 5 + len(bad)
    assert source.skipped == []
    for _ in range(2):
        batch = source.batch(all_of(source))
        assert [source.files[i] for i in batch.index] == sorted(set(source.files) - set(bad))
        assert torch.equal(batch.labels, source.labels[batch.index])
        assert len(batch.images) == 5
        assert source.skipped == bad
    ones = source.batch(torch.where(source.labels == 1)[0])
    assert len(ones.images) == 2


def test_a_decompression_bomb_is_unreadable(
    tmp_path: Path, digits_model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(tmp_path, {"0": 1})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 48 // 2 - 1)
    source = open_source(str(tmp_path), digits_model)
    assert len(source.batch(all_of(source)).images) == 0
    assert source.skipped == ["0/00.png"]


def test_a_batch_without_readable_images_is_empty(tmp_path: Path, digits_model: nn.Module) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "a.jpg").write_bytes(b"")
    source = open_source(str(tmp_path), digits_model)
    batch = source.batch(torch.tensor([0, 0]))
    assert batch.images.shape == (0, 1, 8, 8)
    assert batch.labels.shape == batch.index.shape == (0,)


# --- the cache -----------------------------------------------------------------------------


def test_images_are_decoded_once(tmp_path: Path, digits_model: nn.Module) -> None:
    make_folder(tmp_path, {"0": 3, "1": 3})
    source = open_source(str(tmp_path), digits_model)
    first = source.batch(all_of(source))
    expected = first.images.clone()
    first.images.zero_()  # what a caller does to a batch stays with the caller
    for file in source.files:
        (tmp_path / file).unlink()
    assert torch.equal(source.batch(all_of(source)).images, expected)
    part = source.subset(2, seed=0)
    assert len(part.batch(all_of(part)).images) == 2
    assert not source.skipped


def test_the_cache_stays_within_its_budget(
    tmp_path: Path, digits_model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixels, "CACHE_BYTES", 2 * 64 + 63)  # an image takes 64 bytes
    make_folder(tmp_path, {"0": 4})
    source = open_source(str(tmp_path), digits_model)
    first, second = source.batch(all_of(source)), source.batch(all_of(source))
    assert torch.equal(first.images, second.images)
    for file in source.files:
        (tmp_path / file).unlink()
    assert len(source.batch(all_of(source)).images) == 2


# --- parts ---------------------------------------------------------------------------------


def test_altered_images_keep_files_labels_and_positions(
    tmp_path: Path, imagenet_model: nn.Module
) -> None:
    bad = len(corrupt(make_folder(tmp_path, {"0": 2, "1": 3})))
    source = open_source(str(tmp_path), imagenet_model)
    asked: list[int] = []

    def invert(image: torch.Tensor, position: int) -> torch.Tensor:
        asked.append(position)
        return 255 - image

    part = source.subset(len(source) - 1, seed=0)
    other = part.altered("inverted", invert)
    assert (other.name, other.files) == ("inverted", part.files)
    assert torch.equal(other.classes, source.classes)
    clean, dark = part.batch(all_of(part)), other.batch(all_of(other))
    assert torch.equal(dark.labels, clean.labels)
    assert torch.equal(dark.index, clean.index)
    assert asked == [source.files.index(part.files[i]) for i in clean.index.tolist()]
    assert other.skipped == part.skipped
    assert bad - 1 <= len(other.skipped) <= bad
    # Normalising is affine, so an image and its negative have the same mean everywhere.
    middle = clean.images + dark.images
    assert torch.allclose(middle, middle[:1, :, :1, :1].expand_as(middle), atol=1e-5)
    other.batch(all_of(other))
    assert len(asked) == len(clean.index)  # the second time from the cache


def test_subset_is_balanced_seeded_and_keeps_the_classes(digits_model: nn.Module) -> None:
    source = open_source("digits", digits_model, split="train")
    part = source.subset(43, seed=5)
    assert len(part) == len(set(part.files)) == 43
    counts = part.labels.bincount(minlength=10)
    assert counts.min() == 4
    assert counts.max() == 5
    assert part.files == source.subset(43, seed=5).files
    assert part.files != source.subset(43, seed=6).files
    assert source.subset(3, seed=0).classes.tolist() == list(range(10))
    assert len(source.subset(10**6, seed=0)) == len(source)
    position = source.files.index(part.files[7])
    one, same = part.batch(torch.tensor([7])), source.batch(torch.tensor([position]))
    assert torch.equal(one.images, same.images)
    assert torch.equal(one.labels, same.labels)


def test_subset_is_balanced_as_far_as_classes_go(tmp_path: Path, digits_model: nn.Module) -> None:
    source = open_source(str(make_folder(tmp_path, {"0": 1, "1": 5, "2": 9})), digits_model)
    for seed in range(5):
        assert source.subset(9, seed).labels.bincount().tolist() == [1, 4, 4]


def test_limit_is_a_subset(digits_model: nn.Module) -> None:
    limited = open_source(None, digits_model, limit=20, seed=3)
    assert limited.files == open_source("digits", digits_model).subset(20, seed=3).files
    with pytest.raises(UserError, match="cannot take 0 images"):
        open_source(None, digits_model, limit=0)


def test_split_is_disjoint_complete_stratified_and_seeded(digits_model: nn.Module) -> None:
    source = open_source("digits", digits_model, split="train")
    rest, held = source.split(0.25, seed=1)
    assert len(held) == round(0.25 * len(source))
    assert not set(rest.files) & set(held.files)
    assert set(rest.files) | set(held.files) == set(source.files)
    expected = 0.25 * source.labels.bincount()
    assert (held.labels.bincount(minlength=10) - expected).abs().max() <= 1
    assert held.files == source.split(0.25, seed=1)[1].files
    assert held.files != source.split(0.25, seed=2)[1].files


def test_split_serves_classes_of_one_image(tmp_path: Path, digits_model: nn.Module) -> None:
    source = open_source(str(make_folder(tmp_path, dict.fromkeys("0123456789", 1))), digits_model)
    rest, held = source.split(0.3, seed=0)
    assert (len(rest), len(held)) == (7, 3)
    different = {tuple(source.split(0.3, seed)[1].files) for seed in range(9)}
    assert len(different) > 1


@pytest.mark.parametrize("fraction", [-0.5, 0.0, 0.0001, 1.0, 2.0])
def test_an_empty_part_is_an_error(digits_model: nn.Module, fraction: float) -> None:
    with pytest.raises(UserError, match=f"a fraction of {fraction}"):
        open_source("digits", digits_model).split(fraction, seed=0)


# --- folders -------------------------------------------------------------------------------


def test_only_visible_images_count(tmp_path: Path, digits_model: nn.Module) -> None:
    make_folder(tmp_path, {"0": 1, "1": 0, ".hidden": 2})
    save(tmp_path / "0" / ".thumb.png")
    save(tmp_path / "0" / ".cache" / "x.png")
    save(tmp_path / "0" / "deep" / "Y.JPG")
    (tmp_path / "0" / "notes.txt").write_text("words")
    save(tmp_path / "stray.png")
    assert open_source(str(tmp_path), digits_model).files == ["0/00.png", "0/deep/Y.JPG"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on this system")
def test_only_regular_files_count(tmp_path: Path, digits_model: nn.Module) -> None:
    make_folder(tmp_path, {"0": 1, "1": 1})
    os.mkfifo(tmp_path / "0" / "waits.png")  # whoever opens it waits for a writer
    (tmp_path / "0" / "folder.png").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "1" / "also.png").symlink_to(tmp_path / "fifo")
    (tmp_path / "1" / "linked.png").symlink_to(tmp_path / "1" / "00.png")
    found = open_source(str(tmp_path), digits_model)
    assert found.files == ["0/00.png", "1/00.png", "1/linked.png"]


def test_links_are_followed_once(tmp_path: Path, digits_model: nn.Module) -> None:
    root = make_folder(tmp_path / "root", {"0": 2, "1": 1})
    make_folder(tmp_path, {"elsewhere": 1})
    (root / "0" / "loop").symlink_to(".")
    (root / "0" / "second").symlink_to(root / "0")
    (root / "1" / "out").symlink_to(tmp_path / "elsewhere")
    (root / "1" / "again").symlink_to(tmp_path / "elsewhere")
    found = open_source(str(root), digits_model)
    assert found.files == ["0/00.png", "0/01.png", "1/00.png", "1/again/00.png"]


def test_a_folder_names_its_source(tmp_path: Path, digits_model: nn.Module) -> None:
    for part, digit in (("train", "1"), ("val", "2")):
        make_folder(tmp_path / "birds" / part, {digit: 1})
    root = tmp_path / "birds"
    train = open_source(str(root), digits_model, split="train")
    test = open_source(str(root), digits_model, split="test")
    assert (train.name, train.labels.tolist()) == ("birds/train", [1])
    assert (test.name, test.labels.tolist()) == ("birds/val", [2])
    assert open_source(str(root / "val"), digits_model, split="train").name == "birds/val"
    make_folder(tmp_path / "fish", {"3": 1})
    assert open_source(str(tmp_path / "fish"), digits_model, split="train").name == "fish"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], "no class folders"),
        (["notes.txt"], "no class folders"),
        (["a.png"], "images but no class folders"),
        (["0/notes.txt", "1/x.md"], "no image in its 2 class folders"),
    ],
)
def test_a_folder_without_images_is_an_error(
    tmp_path: Path, digits_model: nn.Module, content: list[str], words: str
) -> None:
    for name in content:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UserError) as error:
        open_source(str(tmp_path), digits_model)
    message = str(error.value)
    assert f"'{tmp_path}' holds {words}; " in message
    assert "CLASS/IMAGE" in message
    assert "\n" not in message


@pytest.mark.parametrize("data", ["no/such/folder", "x", "", "VisionDataset", "CIFARR10:root"])
def test_unknown_data_is_an_error(digits_model: nn.Module, data: str) -> None:
    with pytest.raises(UserError, match=f"data '{data}' is neither a folder nor"):
        open_source(data, digits_model)


@pytest.mark.parametrize("data", ["digits", "FakeData", ".", None])
def test_an_unknown_part_is_an_error(digits_model: nn.Module, data: str | None) -> None:
    with pytest.raises(UserError, match="split='val': choose from train, test"):
        open_source(data, digits_model, split="val")


def test_digits_need_a_head_of_ten(imagenet_model: nn.Module) -> None:
    with pytest.raises(UserError, match=r"'digits' has 10 classes .* 1000 outputs"):
        open_source("digits", imagenet_model)


# --- imports -------------------------------------------------------------------------------


def test_importing_the_module_is_light() -> None:
    code = (
        "import sys, tokenenv.data; "
        "sys.exit(','.join({'timm', 'torchvision', 'sklearn'} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
