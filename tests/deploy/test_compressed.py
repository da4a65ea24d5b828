"""A model and a policy as one module: timm's calls, the game's predictions, and its way to disk."""

from __future__ import annotations

import copy
import json
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from compressed_models import TINY, compressed, deit, digits, model_and_images
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

import agents
import tokenenv
from agents.policies import shipped
from agents.policies.actor import ActorPolicy, Widths
from tokenenv import Backbone, UserError
from tokenenv.data import open_source
from tokenenv.game.episode import EXECUTIONS
from tokenenv.game.policy import play
from tokenenv.game.rules import TokenPrune
from tokenenv.measure.evaluation import evaluate
from tokenenv.vit import blocks, layout
from tokenenv.vit.load import load_model

SPECS = ("norm:keep=0.6,blocks=1/2", "tome:r=5", "merge-above:similarity=0.8")


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("spec", SPECS)
def test_logits_are_the_games(spec: str, execution: str) -> None:
    model, images = model_and_images()
    fast = compressed(spec, model, execution)
    with torch.inference_mode():
        expected = play(fast.backbone, fast.policy, images, "masked").logits
        assert_close(fast(images), expected, atol=1e-4, rtol=0)
        dense = model.eval()(images)
    assert (fast(images) - dense).abs().max() > 1e-3


def test_the_original_is_not_changed() -> None:
    model, images = model_and_images()
    model.train()
    model.blocks[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    fast = compressed("norm:keep=0.5,blocks=1", model)
    fast.train()
    fast(images).sum().backward()
    fast.to(torch.bfloat16).eval()
    assert model.training and not fast.training
    assert all(p.grad is None for p in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    for (_, mine), (_, its) in zip(
        model.named_parameters(), fast.model.named_parameters(), strict=True
    ):
        assert mine.requires_grad == its.requires_grad
    assert fast.state_dict().keys() == {f"model.{name}" for name in before}


@pytest.mark.parametrize(
    "kind",
    [
        "deit", "distilled", "registers (DINOv2)", "average pooling, no class token",
        "average and max pooling", "max pooling", "register, average pooling",
    ],
)  # fmt: skip
@pytest.mark.parametrize("spec", SPECS)
def test_features_and_head_make_the_logits(kind: str, spec: str) -> None:
    model, images = model_and_images(kind)
    fast = compressed(spec, model)
    with torch.inference_mode():
        features = fast.forward_features(images)
        dense = model.eval().forward_features(images)
        assert features.shape == dense.shape
        assert_close(fast.forward_head(features), fast(images), atol=1e-4, rtol=0)
        assert fast.forward_head(features, pre_logits=True).shape[1] == model.num_features
        everyone = compressed("keep-all", model).forward_features(images)
        assert_close(everyone, dense, atol=1e-5, rtol=0)


def test_an_attention_pool_would_read_what_left() -> None:
    model, images = model_and_images("attention pooling (SigLIP)")
    assert compressed("norm:keep=0.5,blocks=1", model)(images).shape == (4, 7)
    with pytest.raises(UserError, match="call the model itself"):
        compressed("norm:keep=0.5,blocks=1", model).forward_features(images)


def test_training_has_the_gradient_of_what_is_left() -> None:
    model, images = model_and_images()
    fast = compressed("tome:r=7", model).train()
    assert fast.model.training
    loss = fast(images).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fast.parameters())
    weight = fast.model.blocks[0].mlp.fc1.weight
    slope = weight.grad.clone()
    with torch.no_grad():  # a step along the gradient does what it promises
        weight -= 1e-3 * slope
        gain = loss - fast(images).square().mean()
    assert_close(gain, 1e-3 * slope.square().sum(), rtol=0.1, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", SPECS)
def test_half_precision(spec: str, dtype: torch.dtype) -> None:
    model, images = model_and_images()
    fast = compressed(spec, model)
    with torch.inference_mode():
        exact = fast(images)
        with torch.autocast("cpu", dtype):
            under = fast(images)
        low = fast.to(dtype)(images.to(dtype))
    assert low.dtype == dtype and low.isfinite().all()
    assert under.isfinite().all()
    assert torch.corrcoef(torch.stack([under.float().flatten(), exact.flatten()]))[0, 1] > 0.98


def test_a_trained_policy_stays_float32() -> None:
    fast = tokenenv.compress(deit(), agents.load("rl4evit-deit_tiny")).to(torch.bfloat16)
    assert {p.dtype for p in fast.policy.parameters()} == {torch.float32}
    assert {p.dtype for p in fast.parameters()} == {torch.bfloat16}
    assert not any(name.startswith("policy") for name in fast.state_dict())
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        assert fast(images.bfloat16()).isfinite().all()
        with torch.autocast("cpu", torch.float16):
            assert fast.float()(images).isfinite().all()


def test_stochastic_depth_draws_for_whole_images(monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model(TINY, depth=2, drop_path_rate=0.5)
    fast = compressed("keep-all", model).train()
    monkeypatch.setattr(layout, "ROWS", 500)
    monkeypatch.setattr(blocks, "_NUMBERS", 0)
    with torch.no_grad():
        tokens = fast.backbone.embed(torch.randn(16, 3, 224, 224))
        for after in (fast.backbone.feed(1, tokens), fast.backbone.attend(1, tokens)[0]):
            dropped = (after.x == tokens.x).all(-1)
            assert (dropped.all(1) | ~dropped.any(1)).all() and len(dropped.unique()) == 2


def test_what_is_compiled_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model, images = model_and_images()
    fast = compressed("merge-above:similarity=0.8", model)
    with torch.inference_mode():
        expected = fast(images)
        assert_close(torch.compile(fast)(images), expected, atol=1e-5, rtol=0)
        twins = [copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))]
        for twin in twins:
            assert_close(torch.compile(twin)(images), expected, atol=1e-5, rtol=0)
        half = torch.compile(fast.bfloat16())(images.bfloat16())
        assert half.dtype == torch.bfloat16 and half.isfinite().all()


@pytest.mark.parametrize("spec", [*SPECS, "random:keep=0.5..0.9,blocks=1/2,seed=3"])
def test_copies_and_pickles(spec: str) -> None:
    model, images = model_and_images()
    fast = compressed(spec, model)
    twins = [copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))]
    with torch.inference_mode():
        expected = fast(images)
        for twin in twins:
            assert_close(twin(images), expected)
            assert twin.backbone.model is twin.model
        twins += [copy.deepcopy(fast)]  # a generator that has drawn goes on from there
        assert_close(twins[-1](images), fast(images))


@pytest.mark.parametrize(
    "spec",
    [
        "keep-all", "random:keep=0.5..0.9,blocks=2/4,seed=3", "norm:keep=0.7",
        "cls-attention:keep=0.7", "tome:r=3", "random-merge:r=3,seed=1",
        "merge-above:similarity=0.9",
    ],
)  # fmt: skip
def test_to_disk_and_back(spec: str, tmp_path: Path) -> None:
    model = digits()
    fast = compressed(spec, model, "padded")
    fast.save(tmp_path / "new/fast")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"fast"}
    names = {path.name for path in (tmp_path / "new/fast").iterdir()}
    assert names == {"compressed.json", "model.safetensors", "policy.safetensors"}
    back = tokenenv.load_compressed(tmp_path / "new/fast")
    assert (back.execution, back.policy) == ("padded", fast.policy)
    images = torch.randn(5, 1, 8, 8)
    with torch.inference_mode():
        assert torch.equal(back(images), fast(images))


def test_what_is_saved_is_the_model_as_it_is(tmp_path: Path) -> None:
    """Other classes, image size, pooling and type than the name says; a trained policy."""
    torch.manual_seed(0)
    model = deit(num_classes=5, img_size=96, global_pool="avg").to(torch.bfloat16)
    compressed("norm:keep=0.7", model).save(tmp_path / "a")
    back = tokenenv.load_compressed(tmp_path / "a")
    images = torch.randn(2, 3, 96, 96).bfloat16()
    with torch.inference_mode():
        assert torch.equal(back.model(images), model.eval()(images))
    fast = tokenenv.compress(deit(), agents.load("dora-deit_tiny"))
    fast.save(tmp_path / "b")
    back = tokenenv.load_compressed(tmp_path / "b")
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        assert torch.equal(back(images), fast(images))
    state = load_file(tmp_path / "b/model.safetensors")
    assert state.keys() == fast.model.state_dict().keys()


def test_drop_rates_are_saved(tmp_path: Path) -> None:
    rates = {"drop_rate": 0.1, "pos_drop_rate": 0.2, "proj_drop_rate": 0.3}
    rates |= {"attn_drop_rate": 0.4, "drop_path_rate": 0.5}
    compressed("norm:keep=0.7", deit(img_size=64, **rates)).save(tmp_path / "a")
    back = tokenenv.load_compressed(tmp_path / "a").model
    assert back.head_drop.p == 0.1 and back.pos_drop.p == 0.2
    for block, rate in zip(back.blocks[1:], torch.linspace(0, 0.5, 12)[1:].tolist(), strict=True):
        assert block.attn.proj_drop.p == block.mlp.drop2.p == 0.3
        assert block.attn.attn_drop.p == 0.4
        assert block.drop_path1.drop_prob == pytest.approx(rate)
    model = deit(img_size=64, drop_path_rate=0.5)
    model.blocks[-1].drop_path1.drop_prob = 0.0
    with pytest.raises(UserError, match="can't be read back"):
        compressed("norm:keep=0.7", model).save(tmp_path / "b")


class NoSave:
    def __init__(self, policy: Any) -> None:
        self.rules, self.act = policy.rules, policy.act


def test_what_cannot_be_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = compressed("norm:keep=0.5", digits())
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for name in ("full", "full/file"):
        with pytest.raises(UserError, match="exists already: choose another folder"):
            fast.save(tmp_path / name)
    with pytest.raises(UserError, match=r"cannot write to .* choose another"):
        fast.save(tmp_path / "full/file/below")
    policy = agents.parse_policy("norm:keep=0.5", 12)
    with pytest.raises(UserError, match=r"NoSave has no save\(path\)"):
        tokenenv.compress(digits(), NoSave(policy)).save(tmp_path / "x")
    for narrow in (
        timm.create_model("vit_tiny_patch16_224", depth=4),
        timm.create_model("vit_tiny_patch16_224", num_heads=4),
    ):
        with pytest.raises(UserError, match="can't be read back: save its state_dict"):
            compressed("norm:keep=0.5,blocks=1", narrow).save(tmp_path / "x")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(fast.policy), "save", full)
    with pytest.raises(UserError, match="No space left on device"):
        fast.save(tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    compressed("norm:keep=0.5", digits()).save(tmp_path / "good")
    content = json.loads((tmp_path / "good/compressed.json").read_text())
    for bad in ("", "[]", "{}", json.dumps(content | {"dtype": "gold"})):
        (tmp_path / "good/compressed.json").write_text(bad)
        with pytest.raises(UserError, match="holds no compressed model"):
            tokenenv.load_compressed(tmp_path / "good")
    with pytest.raises(UserError, match="holds no compressed model"):
        tokenenv.load_compressed(tmp_path / "gone")
    (tmp_path / "good/compressed.json").write_text(json.dumps(content))
    (tmp_path / "good/policy.safetensors").unlink()
    with pytest.raises(UserError, match=r"policy\.safetensors"):
        tokenenv.load_compressed(tmp_path / "good")
    (tmp_path / "good/model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        tokenenv.load_compressed(tmp_path / "good")


def test_what_cannot_be_compressed() -> None:
    fast = compressed("norm:keep=0.5", digits())
    policy = agents.load("rl4evit-deit_tiny")
    with pytest.raises(UserError, match="compressed already: compress the timm model"):
        tokenenv.compress(fast, fast.policy)
    with pytest.raises(UserError, match=r"8 is no policy: give agents\.load"):
        tokenenv.compress(digits(), 8)
    quantised = torch.ao.quantization.quantize_dynamic(digits(), {nn.Linear})
    with pytest.raises(UserError, match="the linear layers of block 0 are Linear"):
        tokenenv.compress(quantised, fast.policy)
    with pytest.raises(UserError, match="trained on model 'deit_tiny_patch16_224', not on 'vit_"):
        tokenenv.compress(timm.create_model("vit_small_patch16_224"), policy)
    wide = timm.models.VisionTransformer(embed_dim=48, depth=12, num_heads=3)  # of no name
    with pytest.raises(UserError, match="the policy was trained for 'deit_tiny_patch16_224'"):
        tokenenv.compress(wide, ActorPolicy(policy.rules, Widths(5, 3, 7), trained_on=TINY))
    with pytest.raises(UserError, match="block 9 is out of range"):
        tokenenv.compress(timm.create_model("digits_vit", depth=6), fast.policy)
    with pytest.raises(UserError, match="execution='fast': choose from masked, padded, packed"):
        compressed("norm:keep=0.5", digits(), "fast")
    with pytest.raises(UserError, match="not timm's VisionTransformer"):
        tokenenv.compress(nn.Linear(2, 2), policy)


def test_a_batch_of_one_is_the_batch_of_64() -> None:
    model, images = model_and_images("deit", 64)
    fast = compressed("merge-above:similarity=0.8", model)
    with torch.inference_mode():
        together = fast(images)
        for i in (0, 40, 63):
            assert_close(fast(images[i : i + 1]), together[i : i + 1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [*shipped(), "merge-above:similarity=0.9"])
def test_predictions_on_real_images_are_the_games(real_data: Path, name: str) -> None:
    model = load_model(TINY, str(real_data / f"weights/{TINY}.safetensors"))
    policy = agents.parse_policy(name, len(model.blocks))
    fast = tokenenv.compress(model, policy)
    source = open_source(str(real_data / "imagenet_val_300"), model, split="test", limit=96)
    result = evaluate(Backbone(model), policy, source, batch_size=32, execution="masked")
    with torch.inference_mode():
        batches = torch.arange(len(source)).split(40)
        found = torch.cat([fast(source.batch(index).images).argmax(1) for index in batches])
    assert torch.equal(found, result.reduced)
    assert len(result.lengths[:, -1].unique()) > 3


def test_other_modules_put_in_are_the_ones_that_run() -> None:
    model, images = model_and_images()
    fast = compressed("tome:r=5", model)
    other = copy.deepcopy(fast.model)
    torch.nn.init.zeros_(other.head.weight)
    torch.nn.init.zeros_(other.head.bias)
    fast.model = other
    with torch.inference_mode():
        assert not fast(images).any()
    fast.model.reset_classifier(5)
    assert fast.num_classes == 5 and fast(images).shape == (4, 5)


def test_no_image_at_all() -> None:
    model, images = model_and_images()
    fast = compressed("tome:r=5", model)
    assert fast(images[:0]).shape == (0, model.num_classes)
    assert fast.forward_features(images[:0]).shape[0] == 0


def test_images_of_another_size(tmp_path: Path) -> None:
    model = deit(dynamic_img_size=True)
    larger = torch.randn(1, 3, 256, 256)
    fast = compressed("random:keep=0.7", model)
    fast.save(tmp_path / "a")
    with torch.inference_mode():
        assert torch.equal(tokenenv.load_compressed(tmp_path / "a")(larger), fast(larger))
    policy = compressed("norm:keep=0.9", model).policy
    policy.rules = TokenPrune((3,), features=("position",))
    with pytest.raises(UserError, match="made for images of 196 patches and these have 256"):
        tokenenv.compress(model, policy)(larger)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "nn"},
        {"model": 5},
        {"options": {"img_size": ["a", 3]}},
        {"options": {"img_size": [8, 8], "global_pool": "foo"}},
        {"options": {"img_size": [8, 8], "bogus": 1}},
    ],
)
def test_a_config_that_someone_changed(options: dict[str, Any], tmp_path: Path) -> None:
    compressed("tome:r=5", digits()).save(tmp_path / "a")
    path = tmp_path / "a/compressed.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
    with pytest.raises(UserError):
        tokenenv.load_compressed(tmp_path / "a")


def test_a_model_whose_namesake_has_no_head_is_saved(tmp_path: Path) -> None:
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=5, img_size=28).eval()
    fast = compressed("tome:r=1", model)
    fast.save(tmp_path / "fast")
    images = torch.randn(2, 3, 28, 28)
    with torch.inference_mode():
        assert_close(tokenenv.load_compressed(tmp_path / "fast")(images), fast(images))
