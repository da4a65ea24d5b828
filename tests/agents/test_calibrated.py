"""Thresholds and counts that images tell."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command_line import write_digits
from torch import Tensor
from torch.testing import assert_close

from agents.policies import load_policy
from agents.policies.calibrated import MOST, DToMe, MeanCounts, calibration_images
from agents.policies.heuristics import MergeAbove, MergeStrongest
from agents.policies.words import parse_policy
from tokenenv import UserError, compress, evaluate, load_backbone
from tokenenv.game.policy import play
from tokenenv.vit.backbone import Backbone


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone()


@pytest.fixture(scope="module")
def images(backbone: Backbone) -> Tensor:
    return calibration_images(backbone, "")


def merged(backbone: Backbone, method: MergeAbove, images: Tensor) -> Tensor:
    """``(blocks, n)`` pairs that were merged."""
    with torch.inference_mode():
        return -torch.stack(play(backbone, method, images).counts).diff(dim=0)


def first_similarities(backbone: Backbone, image: Tensor) -> list[float]:
    """Of every second patch its cosine with the nearest other one, from the first block's keys."""
    block = backbone.model.blocks[0]
    h = block.norm1(backbone.embed(image[None]).x)
    _, k, _ = (
        block.attn.qkv(h)[0].reshape(-1, 3, block.attn.num_heads, block.attn.head_dim).unbind(1)
    )
    key = block.attn.k_norm(k).mean(1)[backbone.prefix :]
    unit = key / key.norm(dim=1, keepdim=True)
    return [max(float(a @ b) for b in unit[1::2]) for a in unit[::2]]


def test_thresholds_merge_r_pairs_on_average(backbone: Backbone, images: Tensor) -> None:
    method = parse_policy("dtome:r=4/3/2,blocks=3/5/8", backbone.depth).calibrated(backbone)
    assert isinstance(method, MergeAbove) and method.rules.blocks == (3, 5, 8)
    counts = merged(backbone, method, images)
    assert len(images) == MOST
    assert counts.double().mean(1).tolist() == pytest.approx([4, 3, 2], abs=0.02)  # but for ties
    assert all(len(each.unique()) > 3 for each in counts), "each image has its own count"


def test_the_first_threshold_by_hand(backbone: Backbone) -> None:
    method = parse_policy("dtome:r=5,blocks=0/1", backbone.depth)
    some = calibration_images(backbone, "")[:40]
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr("agents.policies.calibrated.calibration_images", lambda *_: some)
        found = method.calibrated(backbone)
        ranked = sorted((s for i in some for s in first_similarities(backbone, i)), reverse=True)
    assert found.similarity[0] == pytest.approx(ranked[5 * 40 - 1], abs=1e-5)


def test_blocks_without_merges_are_left_out(backbone: Backbone) -> None:
    method = parse_policy("dtome:r=0/2/0/500,blocks=1/2/3/4", backbone.depth).calibrated(backbone)
    assert method.rules.blocks == (2, 4)
    few = calibration_images(backbone, "")[:8]
    assert merged(backbone, method, few)[1].tolist() == [  # all that there are
        (count + 1) // 2 for count in (64 - merged(backbone, method, few)[0]).tolist()
    ]
    with pytest.raises(UserError, match="r=0 merges nothing"):
        parse_policy("dtome:r=0", backbone.depth).calibrated(backbone)


def test_mean_counts_are_those_of_the_method(backbone: Backbone, images: Tensor) -> None:
    given = "tome:r=5/3/0,blocks=1/2/7,shuffle=0"
    fixed = parse_policy(given, backbone.depth)
    same = parse_policy(f"tome:r=mean({given}),shuffle=0", backbone.depth).calibrated(backbone)
    rules = parse_policy("tome:r=1,shuffle=0", backbone.depth).rules
    assert isinstance(same, MergeStrongest) and same == fixed
    ats = parse_policy("ats:tokens=30", backbone.depth)
    found = MeanCounts(rules, ats).calibrated(backbone)
    assert found.rules.blocks == ats.reduction.blocks
    means = merged(backbone, ats, images).double().mean(1)  # type: ignore[arg-type]
    assert_close(torch.tensor(found.r).double(), means, atol=0.5, rtol=0)


def test_they_are_words_for_every_command(backbone: Backbone, tmp_path: Path) -> None:
    found = evaluate("dtome:r=6", limit=40).evaluation
    assert len(found.macs.unique()) > 5
    schedule = evaluate("tome:r=mean(dtome:r=6)", limit=40).evaluation
    assert len(schedule.macs.unique()) == 1
    fast = compress(backbone.model, "dtome:r=6,blocks=3..11")
    assert fast.policy.rules.blocks == tuple(range(3, 12))
    fast.policy.save(tmp_path / "policy.safetensors")
    assert load_policy(tmp_path / "policy.safetensors") == fast.policy


def test_mistakes_are_named(backbone: Backbone, tmp_path: Path) -> None:
    write_digits(tmp_path / "few", 3)
    few = parse_policy(f"dtome:r=6,images={tmp_path / 'few'}", backbone.depth)
    with pytest.raises(UserError, match=r"few: 3 images are too few to calibrate on, give 32"):
        few.calibrated(backbone)
    missing = parse_policy("dtome:r=6,images=nowhere", backbone.depth)
    with pytest.raises(UserError, match="nowhere"):
        missing.calibrated(backbone)
    for spec, words in (
        ("dtome", "needs r="),
        ("dtome:r=8/6", "r=8/6 gives 2 numbers for 12 blocks"),
        ("dtome:r=-1", "r=-1 pairs to merge"),
        ("tome:r=mean(nothing)", "'nothing' is neither a run folder nor a policy"),
        ("tome:r=mean(dtome:r=6", "is not a number"),
        ("merge-above:similarity=0.9/0.8", "gives 2 numbers for 12 blocks"),
        ("merge-above:similarity=0.9/2,blocks=1/2", "similarity 2 is no cosine"),
        ("tome:r=8,blocks=3..x", "blocks=3..x must be block indices"),
    ):
        with pytest.raises(UserError, match=words):
            parse_policy(spec, 12)
    with pytest.raises(UserError, match=r"DToMe isn't calibrated: call calibrated\(backbone\)"):
        play(backbone, few, torch.zeros(1, *backbone.image_shape))
    assert isinstance(few, DToMe)
