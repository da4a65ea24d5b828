"""torchvision's data sets as image sources."""

from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
from PIL import Image
from test_data import all_of
from torch import nn
from torchvision import datasets

import tokenenv.vit.digits  # noqa: F401  registers digits_vit
from tokenenv.data import open_source
from tokenenv.errors import UserError

WNIDS = timm.data.ImageNetInfo("imagenet-1k").label_names()


class Stub(datasets.VisionDataset):
    """Eight images; the subclasses ask for their part as torchvision's data sets do."""

    classes = ("airplane", "automobile", "bird", "cat")

    def __init__(self, root: str, part: str) -> None:
        super().__init__(root)
        self.part = part
        self.targets = [0, 1, 2, 3] * 2

    def __len__(self) -> int:
        return 8

    def __getitem__(self, position: int) -> tuple[Image.Image, int]:
        shade = (100 if self.part == "train" else 200) + position
        return Image.new("RGB", (32, 32), (shade,) * 3), self.targets[position]


class ByFlag(Stub):
    def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
        assert download
        super().__init__(root, "train" if train else "test")


class ByName(Stub):
    def __init__(self, root: str, split: str = "train") -> None:
        if split not in ("train", "val"):
            raise ValueError(f"Unknown value '{split}' for argument split.")
        super().__init__(root, split)


class Unreachable(Stub):
    def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
        raise OSError("no\nnetwork")


class Unlabelled(Stub):
    def __init__(self, root: str) -> None:
        super().__init__(root, "train")
        self.targets = [{"box": 1}] * 8


@pytest.fixture
def four() -> nn.Module:
    return timm.create_model("deit_tiny_patch16_224", depth=1, img_size=32, num_classes=4)


@pytest.mark.parametrize("stub", [ByFlag, ByName])
def test_a_named_data_set_gives_the_asked_part(
    four: nn.Module, monkeypatch: pytest.MonkeyPatch, stub: type[Stub]
) -> None:
    monkeypatch.setattr(datasets, "CIFAR10", stub)
    train = open_source("cifar10:somewhere", four, split="train")
    test = open_source("CIFAR10", four, split="test")
    assert (train.name, test.name) == ("CIFAR10:train", "CIFAR10:test")
    assert train.labels.tolist() == test.labels.tolist() == [0, 1, 2, 3] * 2
    first, second = (s.batch(all_of(s)).images for s in (train, test))
    assert (second.mean((1, 2, 3)) > first.mean((1, 2, 3)).max()).all()
    assert len(set(train.files)) == 8


def test_cifar_does_not_fit_an_imagenet_head(
    imagenet_model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "CIFAR10", ByFlag)
    with pytest.raises(UserError, match="CIFAR10 has 4 classes and the model's head 1000 outputs"):
        open_source("CIFAR10", imagenet_model)


def test_wnids_of_a_named_data_set_are_used(
    imagenet_model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ByFlag, "wnids", WNIDS[500:504], raising=False)
    monkeypatch.setattr(datasets, "Imagenette", ByFlag)
    assert open_source("imagenette", imagenet_model).classes.tolist() == [500, 501, 502, 503]


def test_a_failed_download_is_one_line(four: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "CIFAR10", Unreachable)
    with pytest.raises(UserError, match=r"CIFAR10.*'here' \(OSError: no network\); check") as error:
        open_source("CIFAR10:here", four)
    assert "\n" not in str(error.value)


def test_an_unknown_part_is_one_line(four: nn.Module) -> None:
    with pytest.raises(UserError, match=r"EMNIST cannot be opened .*argument split"):
        open_source("EMNIST", four)


def test_a_data_set_without_labels_is_an_error(
    four: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "VOCDetection", Unlabelled)
    with pytest.raises(UserError, match="VOCDetection has no class label"):
        open_source("VOCDetection", four)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    small = partial(datasets.FakeData, size=40, image_size=(3, 8, 8))
    monkeypatch.setattr(datasets, "FakeData", small)


def test_a_data_set_of_one_part_is_split(imagenet_model: nn.Module, fake: None) -> None:
    train = open_source("FakeData", imagenet_model, split="train")
    test = open_source("fakedata", imagenet_model, split="test")
    assert (len(train), len(test)) == (32, 8)
    assert not set(train.files) & set(test.files)
    again = open_source("FakeData", imagenet_model)
    one, same = test.batch(all_of(test)), again.batch(all_of(again))
    assert torch.equal(one.images, same.images)


def test_labels_beyond_the_head_are_an_error(four: nn.Module, fake: None) -> None:
    with pytest.raises(UserError, match="FakeData has label 9 and the model's head 4 outputs"):
        open_source("FakeData", four)
