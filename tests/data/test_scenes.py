"""Generated scenes: the same each time, of glyphs of their own part, with what the task needs."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import nn

import tokenenv.vit.scenes  # noqa: F401  registers scenes_vit
from tokenenv.data import open_source
from tokenenv.data.scenes import CHUNK, COUNTS, SIDE, data_set, glyphs, scenes
from tokenenv.data.splits import Split
from tokenenv.errors import UserError
from tokenenv.vit.digits import digits

PARTS: tuple[Split, ...] = ("train", "validation", "test")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return timm.create_model("scenes_vit")


def test_what_a_scene_is() -> None:
    drawn = scenes("test", 200)
    assert drawn.images.shape == drawn.ink.shape == (200, 1, SIDE, SIDE)
    assert drawn.images.dtype == drawn.ink.dtype == torch.uint8
    assert torch.equal(drawn.labels, glyphs("test")[1][drawn.glyphs])
    counts = drawn.labels.bincount(minlength=10)
    assert len(counts) == 10 and counts.min() >= 8


@pytest.mark.parametrize("part", PARTS)
def test_a_scene_depends_on_its_part_and_number_only(part: Split) -> None:
    whole = scenes(part, 3 * CHUNK)
    torch.manual_seed(5)
    np.random.seed(5)
    some = scenes(part, CHUNK, start=CHUNK - 7)
    for field, again in zip(whole, some, strict=True):
        assert torch.equal(field[CHUNK - 7 : 2 * CHUNK - 7], again)
    assert len(whole.images.flatten(1).unique(dim=0)) == 3 * CHUNK
    far = scenes(part, 1, start=2**40)
    assert not torch.equal(far.images, whole.images[:1])
    other = PARTS[(PARTS.index(part) + 1) % 3]
    same = scenes(other, CHUNK).images.flatten(1) == whole.images[:CHUNK].flatten(1)
    assert not same.all(1).any()


def test_the_parts_are_of_different_glyphs() -> None:
    parts = {part: glyphs(part) for part in PARTS}
    seen = [
        {(int(label), *shape.flatten().tolist()) for shape, label in zip(*found, strict=True)}
        for found in parts.values()
    ]
    assert [len(each) for each in seen] == [len(labels) for _, labels in parts.values()]
    assert len(set.union(*seen)) == sum(map(len, seen)) == 1797
    for _, labels in parts.values():
        assert labels.bincount(minlength=10).min() >= 17
    assert torch.equal(parts["test"][1], digits("test")[1])


def test_the_digit_is_where_the_ink_is_and_brighter_than_its_surroundings() -> None:
    drawn = scenes("train", 500)
    pixels, ink = drawn.images.float(), drawn.ink.float() / 255
    inside, outside = (pixels * ink).sum((1, 2, 3)) / ink.sum((1, 2, 3)), pixels.mean((1, 2, 3))
    assert (inside > outside + 30).all()
    height = (ink.amax((1, 3)) > 0.3).sum(1)
    assert height.min() >= 8 and height.max() <= 40
    # Everywhere on the canvas, in many sizes: how many of the 144 tokens matter differs.
    tokens = (nn.functional.max_pool2d(ink, 4) > 0.3).sum((1, 2, 3)).float()
    assert tokens.quantile(0.1) < 15 and tokens.quantile(0.9) > 28
    middle = (ink * torch.arange(SIDE)).sum((1, 2, 3)) / ink.sum((1, 2, 3))
    assert middle.min() < 10 and middle.max() > 37


def test_clutter_is_dense_or_sparse() -> None:
    drawn = scenes("train", 500)
    bright = (drawn.images > 150) & (drawn.ink < 30)
    share = bright.float().mean((1, 2, 3))
    assert share.quantile(0.1) < 0.004 < 0.025 < share.quantile(0.9)


# Of the first scenes of the test part.
LABELS = [0, 9, 5, 4, 3, 0, 9, 5, 8, 4, 2, 3, 5, 5, 9, 8]
MEANS = [62.3, 54.86, 59.12, 70.03, 45.99, 53.68, 39.05, 55.78]
PIXELS = [[71, 36, 141, 138], [35, 58, 130, 0]]


def test_the_pixels_never_change() -> None:
    """Not a hash: single pixels may be rounded differently on another processor."""
    drawn = scenes("test", CHUNK)
    assert drawn.labels[:16].tolist() == LABELS
    means = drawn.images[:8].float().mean((1, 2, 3))
    torch.testing.assert_close(means, torch.tensor(MEANS), atol=0.02, rtol=0)
    corner = drawn.images[:2, 0, 24, ::12].int()
    assert (corner - torch.tensor(PIXELS)).abs().max() <= 1


@pytest.mark.parametrize(("count", "start"), [(0, 0), (-1, 0), (1, -1)])
def test_scenes_that_there_are_not(count: int, start: int) -> None:
    with pytest.raises(UserError, match="ask for at least 1, from 0 or later"):
        scenes("test", count, start)


@pytest.mark.parametrize("part", PARTS)
def test_the_data_set(model: nn.Module, part: Split) -> None:
    source = open_source("scenes", model, split=part)
    assert len(source) == COUNTS[part] and source.name == f"scenes:{part}"
    assert torch.equal(source.labels, data_set(part).labels)
    batch = source.batch(torch.tensor([3, 0]))
    pixels = scenes(part, 4).images[[3, 0]].float() / 255
    mean, std = (model.pretrained_cfg[name][0] for name in ("mean", "std"))
    torch.testing.assert_close(batch.images, (pixels - mean) / std)


def test_the_model_chooses_its_images(model: nn.Module, digits_model: nn.Module) -> None:
    assert open_source(None, model).name == "scenes:test"
    assert open_source(None, digits_model).name == "digits:test"
    assert open_source("digits", model, limit=10).shape == (1, SIDE, SIDE)
    assert open_source("scenes", digits_model, limit=10).shape == (1, 8, 8)


def test_parts_and_heads_that_do_not_fit(model: nn.Module, imagenet_model: nn.Module) -> None:
    with pytest.raises(UserError, match="split='val': choose from train, validation, test"):
        open_source("scenes", model, split="val")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="split='validation': choose from train, test"):
        open_source("digits", model, split="validation")
    with pytest.raises(UserError, match=r"'scenes' has 10 classes .* 1000 outputs; use model 'sce"):
        open_source("scenes", imagenet_model)
