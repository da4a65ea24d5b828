from __future__ import annotations

import hashlib

import pytest
import timm
import torch
from safetensors import safe_open
from torch import nn

from tokenenv.data import open_source
from tokenenv.errors import UserError
from tokenenv.vit.digits import WEIGHTS, digits


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return timm.create_model("digits_vit", pretrained=True).eval()


def test_the_model_is_what_it_says(model: nn.Module) -> None:
    assert len(model.blocks) == 12
    assert model.embed_dim == 48
    assert model.blocks[0].attn.num_heads == 3
    assert model.num_prefix_tokens == 1
    assert model.patch_embed.grid_size == (8, 8)
    assert model.patch_embed.proj.kernel_size == (3, 3)
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert model.forward_features(torch.zeros(2, 1, 8, 8)).shape == (2, 65, 48)


def test_tokens_lie_where_their_pixels_do(model: nn.Module) -> None:
    image = torch.zeros(1, 1, 8, 8)
    lit = image.clone()
    lit[..., 2, 5] = 1.0
    changed = (model.patch_embed(lit) - model.patch_embed(image)).abs().sum(2).view(8, 8) > 1e-6
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[1:4, 4:7] = True
    assert torch.equal(changed, expected)


def test_accuracy_on_the_test_images(model: nn.Module) -> None:
    source = open_source("digits", model, split="test")
    batch = source.batch(torch.arange(len(source)))
    with torch.inference_mode():
        accuracy = (model(batch.images).argmax(1) == batch.labels).float().mean().item()
    assert accuracy >= 0.97
    with safe_open(WEIGHTS, "pt") as file:
        assert abs(float(file.metadata()["test_accuracy"]) - accuracy) < 0.002
        assert {"seed", "command"} <= file.metadata().keys()


def test_the_weights_are_small() -> None:
    assert WEIGHTS.stat().st_size <= 2 * 2**20


def test_pretrained_is_not_random() -> None:
    one, other = (timm.create_model("digits_vit", pretrained=True) for _ in range(2))
    fresh = timm.create_model("digits_vit")
    assert torch.equal(one.head.weight, other.head.weight)
    assert not torch.equal(one.head.weight, fresh.head.weight)


@pytest.mark.parametrize("option", [{"depth": 3}, {"in_chans": 3}, {"num_classes": 4}])
def test_weights_that_do_not_fit_are_an_error(option: dict[str, int]) -> None:
    assert timm.create_model("digits_vit", **option)
    with pytest.raises(UserError, match="pretrained=False") as error:
        timm.create_model("digits_vit", pretrained=True, **option)
    assert "\n" not in str(error.value)


def test_the_split_is_disjoint_complete_and_stratified() -> None:
    from sklearn.datasets import load_digits

    (train, train_labels), (test, test_labels) = digits("train"), digits("test")
    assert train.shape == (1197, 1, 8, 8)
    assert test.shape == (600, 1, 8, 8)
    assert train.dtype == test.dtype == torch.uint8
    pixels, labels = load_digits(return_X_y=True)

    def key(image: torch.Tensor, label: torch.Tensor) -> bytes:
        return bytes([*image.flatten().tolist(), int(label)])

    whole = torch.from_numpy(pixels).mul(255 / 16).round().to(torch.uint8)
    parts = [key(*pair) for pair in zip(train, train_labels, strict=True)]
    parts += [key(*pair) for pair in zip(test, test_labels, strict=True)]
    everything = [key(*pair) for pair in zip(whole, torch.from_numpy(labels), strict=True)]
    assert sorted(parts) == sorted(everything)
    assert len(set(everything)) == 1797  # no image twice, so the parts are disjoint
    share = test_labels.bincount() / (test_labels.bincount() + train_labels.bincount())
    assert (share - 600 / 1797).abs().max() < 0.005


def test_the_split_never_changes() -> None:
    images, labels = digits("test")
    digest = hashlib.sha256(images.numpy().tobytes() + bytes(labels.tolist())).hexdigest()
    assert digest[:16] == "e02ffe106527c2bf"
