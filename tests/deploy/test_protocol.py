"""A compressed model in the hands of timm's tools: groups, checkpointing, features, classifiers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from compressed_models import compressed, deit, digits, model_and_images
from timm.data import resolve_model_data_config
from timm.models._manipulate import group_with_matcher
from timm.optim import create_optimizer_v2
from torch import nn
from torch.testing import assert_close
from torch.utils._pytree import tree_map

import tokenenv
from tokenenv import UserError
from tokenenv.vit.twin import differing_setting


def test_groups_of_parameters_are_timms() -> None:
    model = digits()
    fast = compressed("norm:keep=0.6", model)
    assert fast.no_weight_decay() == {f"model.{name}" for name in model.no_weight_decay()}
    for coarse in (False, True):
        own = group_with_matcher(
            model.named_parameters(), model.group_matcher(coarse), reverse=True
        )
        found = group_with_matcher(
            fast.named_parameters(), fast.group_matcher(coarse), reverse=True
        )
        assert found == {f"model.{name}": group for name, group in own.items()}
        assert len(set(found.values())) == 14  # the stem, 12 blocks, the head with the norm
    options: dict[str, Any] = {"opt": "adamw", "lr": 1e-3, "weight_decay": 0.1, "layer_decay": 0.7}
    groups, others = (create_optimizer_v2(each, **options).param_groups for each in (fast, model))
    assert [group["lr_scale"] for group in groups] == [group["lr_scale"] for group in others]
    assert [len(group["params"]) for group in groups] == [len(group["params"]) for group in others]
    assert [group["weight_decay"] for group in groups] == [g["weight_decay"] for g in others]


def test_attributes_are_the_models() -> None:
    model = digits()
    fast = compressed("norm:keep=0.6", model)
    for name in ("embed_dim", "num_features", "head_hidden_size", "num_classes", "default_cfg"):
        assert getattr(fast, name) == getattr(model, name)
    assert fast.get_classifier() is fast.model.head
    fast.model.pretrained_cfg = {**model.pretrained_cfg, "crop_pct": 0.5}
    assert resolve_model_data_config(fast)["crop_pct"] == 0.5


@pytest.mark.parametrize("before", [True, False])
def test_checkpointing_keeps_less_and_gives_the_same_gradient(before: bool) -> None:
    torch.manual_seed(0)
    model = deit(img_size=64, drop_path_rate=0.3, proj_drop_rate=0.1).train()
    plain = compressed("norm:keep=0.6", model).train()
    model.set_grad_checkpointing(before)
    fast = compressed("norm:keep=0.6", model).train()
    fast.set_grad_checkpointing()
    images, kept, slopes = torch.randn(3, 3, 64, 64), [], []
    for each in (plain, fast):
        held: list[int] = []
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, held=held: (held.append(t.nbytes), t)[1],  # type: ignore[misc]
            lambda t: t,
        ):
            loss = each(images).square().mean()
        loss.backward()
        kept.append(sum(held))
        slopes.append([p.grad for p in each.parameters()])
    assert kept[1] < 0.3 * kept[0]
    assert all(map(torch.equal, *slopes))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"indices": [1, -1], "return_prefix_tokens": True, "norm": True, "stop_early": True},
        {"indices": 2, "output_fmt": "NLC", "output_dict": True, "return_prefix_tokens": True},
        {"indices": (0, 2), "intermediates_only": True},
        {"indices": 1, "stop_early": True, "output_dict": True, "intermediates_only": True},
    ],
)
@pytest.mark.parametrize("kind", ["deit", "average pooling, no class token"])
@torch.inference_mode()
def test_intermediates_in_timms_form(kind: str, options: dict[str, Any]) -> None:
    model, images = model_and_images(kind)
    expected = model.eval().forward_intermediates(images, **options)
    found = compressed("keep-all", model).forward_intermediates(images, **options)
    assert_close(found, expected, atol=1e-5, rtol=0)
    nobody = compressed("keep-all", model).forward_intermediates(images[:0], **options)
    assert_close(nobody, tree_map(lambda t: t[:0], expected))


@pytest.mark.parametrize("spec", ["norm:keep=0.5,blocks=1/2", "tome:r=9"])
@torch.inference_mode()
def test_intermediates_have_a_token_for_each_patch(spec: str) -> None:
    model, images = model_and_images()
    fast = compressed(spec, model)
    before, *_, last = fast.get_intermediate_layers(images, 4, norm=True, return_prefix_tokens=True)
    features = fast.forward_features(images)
    assert torch.equal(torch.cat([last[1], last[0]], 1), features)
    assert torch.equal(fast.forward_intermediates(images)[0], features)
    assert last[0].shape == before[0].shape
    counts = [len(image.unique(dim=0)) for image in last[0]]
    assert max(counts) < before[0].shape[1]  # what left shares a token
    (grid,) = fast.get_intermediate_layers(images, reshape=True, norm=True)
    assert torch.equal(grid.flatten(2).transpose(1, 2), last[0])


@torch.inference_mode()
def test_intermediates_of_other_sizes() -> None:
    model = deit(dynamic_img_size=True, depth=2)
    (wide,) = compressed("norm:keep=0.5,blocks=1", model).get_intermediate_layers(
        torch.randn(1, 3, 224, 256), reshape=True
    )
    assert wide.shape == (1, 192, 14, 16)
    small = compressed("resize:size=112", model).forward_intermediates(torch.randn(1, 3, 224, 224))
    assert small[1][0].shape == (1, 192, 7, 7)


def test_mistakes() -> None:
    fast = compressed("norm:keep=0.5", digits())
    images = torch.randn(1, 1, 8, 8)
    for indices in ([12], 13, 0, [-13], []):
        with pytest.raises(UserError, match="blocks 0 to 11"):
            fast.forward_intermediates(images, indices)
    with pytest.raises(UserError, match="output_fmt='NHWC': choose from 'NCHW', 'NLC'"):
        fast.forward_intermediates(images, output_fmt="NHWC")
    with pytest.raises(UserError, match=r"num_classes=0: .* pre_logits=True"):
        fast.reset_classifier(0)
    for pooling in ("", "map", "avgg"):
        with pytest.raises(UserError, match=f"global_pool='{pooling}'"):
            fast.reset_classifier(5, pooling)
    assert fast(images).shape == (1, 10)


def test_another_classifier() -> None:
    fast = compressed("tome:r=5", digits())
    fast.reset_classifier(4, "avg")
    images = torch.randn(3, 1, 8, 8)
    assert fast.num_classes == fast.backbone.classes == fast(images).shape[1] == 4
    with torch.inference_mode():
        assert_close(fast.forward_head(fast.forward_features(images)), fast(images))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("patch_embed.dynamic_img_pad", {"dynamic_img_size": True, "dynamic_img_pad": True}),
        ("dynamic_img_size", {"dynamic_img_size": True}),
        ("pos_drop.p", {"pos_drop_rate": 0.3}),
    ],
)
def test_what_no_image_of_full_size_shows_is_saved(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = deit(img_size=64, **options)
    other = deit(img_size=64, dynamic_img_size="dynamic_img_pad" in options)
    assert differing_setting(model, other).startswith(f"{name} is ")
    model.set_grad_checkpointing()
    compressed("norm:keep=0.7", model).save(tmp_path / "a")
    back = tokenenv.load_compressed(tmp_path / "a").model
    assert not differing_setting(model, back) and back.grad_checkpointing
    if "dynamic_img_pad" in options:
        assert back(torch.randn(1, 3, 70, 50)).shape == (1, 1000)


def test_a_setting_that_cannot_be_saved_is_named(tmp_path: Path) -> None:
    model = deit(img_size=64)
    model.patch_embed.strict_img_size = False
    with pytest.raises(UserError, match=r"patch_embed\.strict_img_size is False and would be True"):
        compressed("norm:keep=0.7", model).save(tmp_path / "a")
    assert not any(tmp_path.iterdir())


def quantised(model: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


@pytest.mark.parametrize("spec", ["norm:keep=0.6", "tome:r=3", "resize:size=112"])
def test_quantised_after_it_was_compressed(spec: str, tmp_path: Path) -> None:
    model = digits() if "size" not in spec else timm.create_model("deit_tiny_patch16_224", depth=2)
    fast = compressed(spec, model)
    small = quantised(fast)
    kinds = {type(m).__module__.split(".")[2] for m in small.modules() if hasattr(m, "in_features")}
    assert kinds == {"nn"} and not any(isinstance(m, nn.Linear) for m in small.modules())
    images = torch.randn(5, *fast.backbone.image_shape)
    with torch.inference_mode():
        both = torch.stack([small(images).flatten(), fast(images).flatten()])
        assert torch.corrcoef(both)[0, 1] > 0.9
        fast.model = quantised(fast.model)
        assert torch.corrcoef(torch.stack([fast(images).flatten(), both[0]]))[0, 1] > 0.99
    assert small.backbone.dtype == torch.float32 and small.backbone.device.type == "cpu"
    with pytest.raises(UserError, match=r"quantised and can't be saved: save the model before"):
        small.save(tmp_path / "a")
    assert not any(tmp_path.iterdir())


def test_a_quantised_model_is_not_measured_wrongly() -> None:
    with pytest.raises(UserError, match="can't be measured, as its layers were quantised"):
        tokenenv.evaluate(quantised(compressed("norm:keep=0.6", digits())), limit=20)
