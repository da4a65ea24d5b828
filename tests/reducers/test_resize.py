"""Smaller images: timm's own model of that size, at its cost, beside the dense full-size model."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from test_backbone import FAMILY, SMALL, family_model, image_for
from timm.layers import resample_abs_pos_embed
from torch import Tensor
from torch.testing import assert_close

import tokenenv
from agents.policies.words import parse_policy
from tokenenv import load_backbone, open_source
from tokenenv.game.cost import Cost, measured_macs
from tokenenv.game.episode import EXECUTIONS
from tokenenv.game.policy import play
from tokenenv.measure import evaluation
from tokenenv.measure.candidate import MethodCandidate
from tokenenv.measure.speed import bench
from tokenenv.reducers.resize import smaller
from tokenenv.vit.backbone import Backbone

KINDS = {"deit": 64, "registers (DINOv2)": 70, "layer scale, class token without position": 96,
         "attention pooling (SigLIP)": 48, "register, average pooling": 80,
         "dynamic image size": 32}  # fmt: skip


def by_hand(backbone: Backbone, kind: str, size: int, images: Tensor) -> Tensor:
    """Logits of a fresh timm model of that size, given the weights."""
    name, options = FAMILY[kind]
    model = timm.create_model(name, **{**SMALL, **options, "img_size": size}).eval()
    state = dict(backbone.model.state_dict())
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    grid = list(model.patch_embed.grid_size)
    state["pos_embed"] = resample_abs_pos_embed(
        state["pos_embed"], grid, old_size=list(backbone.grid), num_prefix_tokens=prefix
    )
    model.load_state_dict(state)
    with torch.inference_mode():
        return model(F.interpolate(images, (size, size), mode="bicubic", antialias=True))


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_timms_model_of_that_size(kind: str, execution: str) -> None:
    backbone, size = family_model(kind), KINDS[kind]
    images, policy = image_for(backbone, 3), parse_policy(f"resize:size={size}", 4)
    state = copy.deepcopy(backbone.model.state_dict())
    with torch.inference_mode():
        dense = backbone(images)
        episode = play(backbone, policy, images, execution)  # type: ignore[arg-type]
        assert torch.equal(backbone(images), dense)
    assert_close(episode.logits, by_hand(backbone, kind, size, images), atol=1e-5, rtol=0)
    assert (episode.logits - dense).abs().max() > 1e-3
    assert_close(dict(backbone.model.state_dict()), dict(state), rtol=0, atol=0)
    counted = measured_macs(lambda: play(backbone, policy, images[:1], "padded"))
    macs = Cost(backbone).of(episode, policy)
    assert macs.tolist() == [pytest.approx(counted, rel=1e-9)] * 3


def test_the_full_size_is_the_dense_model() -> None:
    backbone = family_model("deit")
    images = image_for(backbone, 2)
    episode = play(backbone, parse_policy("resize:size=112", 4), images)
    assert_close(episode.logits, backbone(images), atol=1e-5, rtol=0)


def test_it_follows_the_weights() -> None:
    """They may change, move, or be put in another's place; nothing remembers the old ones."""
    backbone = family_model("deit")
    images, policy = image_for(backbone, 2), parse_policy("resize:size=64", 4)

    def logits() -> Tensor:
        with torch.inference_mode():
            found = play(backbone, policy, images.to(backbone.dtype)).logits
        assert found is not None
        return found

    def check() -> None:
        assert_close(logits().float(), by_hand(backbone, "deit", 64, images), atol=1e-4, rtol=0)

    check()
    assert smaller(backbone, 64) is smaller(backbone, 64)
    with torch.no_grad():
        backbone.model.pos_embed += torch.randn_like(backbone.model.pos_embed)
        backbone.model.blocks[0].attn.qkv.weight.mul_(1.5)
    check()
    backbone.double()
    check()
    backbone.float()
    other = {name: torch.randn_like(t) * 0.1 for name, t in backbone.model.state_dict().items()}
    backbone.model.load_state_dict(other, assign=True)
    check()


def test_training_reaches_the_position_embeddings() -> None:
    model = family_model("deit").model.requires_grad_(True)
    fast = tokenenv.compress(model, parse_policy("resize:size=64", 4)).train()
    images = image_for(fast.backbone, 2)
    with torch.inference_mode():
        fast(images)
    for _ in range(2):
        fast.zero_grad()
        fast(images).square().sum().backward()
        grad = fast.model.pos_embed.grad
        assert grad is not None and grad.abs().sum() > 0
        assert all(p.grad is not None for p in fast.parameters())


def test_as_a_compressed_model(tmp_path: Path) -> None:
    backbone = load_backbone()
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    fast = tokenenv.compress(backbone.model, parse_policy("resize:size=6", 12))
    fast.save(tmp_path / "fast")
    with torch.inference_mode():
        expected = fast(images)
        for twin in (
            copy.deepcopy(fast),
            pickle.loads(pickle.dumps(fast)),
            tokenenv.load_compressed(tmp_path / "fast"),
        ):
            assert_close(twin(images), expected)
        features = fast.forward_features(images)
        assert_close(fast.forward_head(features), expected)
    assert features.shape[1] == fast.backbone.prefix + 36
    half = fast.to(torch.bfloat16)
    assert half(images.bfloat16()).dtype == torch.bfloat16


def test_evaluated_beside_the_dense_model() -> None:
    backbone = load_backbone()
    source = open_source(None, backbone.model, limit=100)
    report = evaluation.evaluate(backbone, parse_policy("resize:size=6", 12), source).report()
    dense = evaluation.evaluate(backbone, parse_policy("keep-all", 12), source).report()
    assert report["top1_dense"] == dense["top1"] and report["gmacs_dense"] == dense["gmacs"]
    assert report["tokens"] == [36.0] * 12
    small = Cost(smaller(backbone, 6)).dense() / 1e9
    assert report["gmacs"] == pytest.approx(small, rel=1e-12)
    assert 20 < report["top1"] < dense["top1"]


def test_on_the_clock() -> None:
    backbone = family_model("deit")
    candidates = [MethodCandidate("resize", parse_policy("resize:size=64", 4), backbone)]
    dense, small = bench(backbone, candidates, image_for(backbone, 4), rounds=2)
    assert small.gmacs == Cost(smaller(backbone, 64)).dense_executed() / 1e9
    assert small.gmacs_dense == dense.gmacs == Cost(backbone).dense() / 1e9
    assert small.peak_mib < dense.peak_mib
