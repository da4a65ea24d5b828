from __future__ import annotations

import pytest
import timm
import torch
from safetensors import safe_open
from torch import nn

from tokenenv.data import open_source
from tokenenv.errors import UserError
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.load import load_backbone
from tokenenv.vit.scenes import WEIGHTS


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return timm.create_model("scenes_vit", pretrained=True).eval()


def test_the_model_is_what_it_says(model: nn.Module) -> None:
    assert len(model.blocks) == 8 and model.embed_dim == 64
    assert model.blocks[0].attn.num_heads == 4 and model.num_prefix_tokens == 1
    assert model.patch_embed.grid_size == (12, 12)
    assert model(torch.zeros(2, 1, 48, 48)).shape == (2, 10)
    assert model.forward_features(torch.zeros(2, 1, 48, 48)).shape == (2, 145, 64)


def test_tokens_lie_where_their_pixels_do(model: nn.Module) -> None:
    image = torch.zeros(1, 1, 48, 48)
    lit = image.clone()
    lit[..., 4 * 3 + 2, 4 * 7 + 2] = 1.0
    changed = (model.patch_embed(lit) - model.patch_embed(image)).abs().sum(2).view(12, 12) > 1e-6
    expected = torch.zeros(12, 12, dtype=torch.bool)
    expected[3:5, 7:9] = True
    assert changed[3, 7] and not (changed & ~expected).any()


def test_accuracy_on_test_scenes(model: nn.Module) -> None:
    source = open_source(None, model, split="test").subset(1500, seed=1)
    batch = source.batch(torch.arange(len(source)))
    with torch.inference_mode():
        found = torch.cat([model(part).argmax(1) for part in batch.images.split(250)])
    accuracy = (found == batch.labels).float().mean().item()
    assert accuracy >= 0.95
    with safe_open(WEIGHTS, "pt") as file:
        about = file.metadata()
    assert {"seed", "command"} <= about.keys()
    # The file's number is of all 4,000: four standard errors of the mean of 1,500.
    share = float(about["test_accuracy"])
    assert abs(share - accuracy) < 4 * (share * (1 - share) / 1500) ** 0.5


def test_the_large_model_has_the_small_ones_tokens_and_others_between(model: nn.Module) -> None:
    large = timm.create_model("scenes_vit_patch2", pretrained=True).eval()
    assert large.patch_embed.grid_size == (24, 24)
    images = torch.randn(2, 1, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        few, many = model.patch_embed.proj(images), large.patch_embed.proj(images)
    torch.testing.assert_close(many[:, :, ::2, ::2], few, atol=1e-6, rtol=1e-5)
    backbone = load_backbone("scenes_vit_patch2")
    assert (backbone.patches, backbone.architecture) == (576, "scenes_vit_patch2")


def test_the_large_model_sees_as_much_as_the_small_one(model: nn.Module) -> None:
    large = timm.create_model("scenes_vit_patch2", pretrained=True).eval()
    source = open_source(None, large, split="validation").subset(200, seed=1)
    assert source.name.startswith("scenes")
    batch = source.batch(torch.arange(len(source)))
    with torch.inference_mode():
        found = torch.cat([large(part).argmax(1) for part in batch.images.split(25)])
    assert (found == batch.labels).float().mean().item() >= 0.93  # 0.978 on all 1,000


def test_the_weights_are_small_and_halves() -> None:
    assert WEIGHTS.stat().st_size <= 2 * 2**20
    with safe_open(WEIGHTS, "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118


def test_it_is_loaded_as_any_model(model: nn.Module) -> None:
    backbone = load_backbone("scenes_vit")
    assert isinstance(backbone, Backbone) and backbone.dtype == torch.float32
    assert (backbone.depth, backbone.patches, backbone.architecture) == (8, 144, "scenes_vit")
    images = torch.randn(3, 1, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(backbone(images), model(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("option", [{"depth": 3}, {"in_chans": 3}, {"num_classes": 4}])
def test_weights_that_do_not_fit_are_an_error(option: dict[str, int]) -> None:
    assert timm.create_model("scenes_vit", **option)
    with pytest.raises(UserError, match="pretrained=False") as error:
        timm.create_model("scenes_vit", pretrained=True, **option)
    assert "\n" not in str(error.value)
