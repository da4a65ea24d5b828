"""Endless streams of images: what they show, in which order, and how they go on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from image_folders import corrupt, make_folder
from torch import nn

from tokenenv.data import Stream, open_source
from tokenenv.errors import UserError


def test_a_stream_shows_every_readable_image_once_an_epoch(
    tmp_path: Path, digits_model: nn.Module
) -> None:
    bad = corrupt(make_folder(tmp_path, {"0": 7, "1": 5}))
    source = open_source(str(tmp_path), digits_model)
    stream = Stream(source, 4, seed=0)  # 3 batches make an epoch of 12 readable images
    epochs = [torch.cat([stream.next().index for _ in range(3)]).tolist() for _ in range(3)]
    readable = [i for i, file in enumerate(source.files) if file not in bad]
    assert all(sorted(epoch) == readable for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_a_batch_may_be_larger_than_the_source(tmp_path: Path, digits_model: nn.Module) -> None:
    source = open_source(str(make_folder(tmp_path, {"0": 2, "1": 1})), digits_model)
    assert Stream(source, 7, seed=0).next().index.bincount().sort().values.tolist() == [2, 2, 3]


def test_a_seed_is_a_stream(digits_model: nn.Module) -> None:
    source = open_source("digits", digits_model)
    orders = [Stream(source, 50, seed).next().index.tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 8])
def test_a_resumed_stream_goes_on_exactly(
    tmp_path: Path, digits_model: nn.Module, steps: int
) -> None:
    corrupt(make_folder(tmp_path, {"0": 4, "1": 5}))
    unbroken = Stream(open_source(str(tmp_path), digits_model), 5, seed=3)
    for _ in range(steps):
        unbroken.next()
    state = json.loads(json.dumps(unbroken.state_dict()))
    # Another process: nothing read yet, and a seed that the state must override.
    resumed = Stream(open_source(str(tmp_path), digits_model), 5, seed=99)
    resumed.load_state_dict(state)
    for _ in range(7):
        for one, other in zip(unbroken.next(), resumed.next(), strict=True):
            assert torch.equal(one, other)


def test_a_stream_does_not_resume_on_other_data(digits_model: nn.Module) -> None:
    source = open_source("digits", digits_model)
    state = Stream(source, 5, seed=0).state_dict()
    with pytest.raises(UserError, match=r"read 600 images.*has 20"):
        Stream(source.subset(20, 0), 5, seed=0).load_state_dict(state)


def test_a_batch_size_below_one_is_an_error(digits_model: nn.Module) -> None:
    with pytest.raises(UserError, match="batch size 0"):
        Stream(open_source("digits", digits_model), 0, seed=0)


def test_a_stream_of_unreadable_images_ends(tmp_path: Path, digits_model: nn.Module) -> None:
    for name in "abc":
        (tmp_path / "0").mkdir(exist_ok=True)
        (tmp_path / "0" / f"{name}.jpg").write_bytes(b"x")
    source = open_source(str(tmp_path), digits_model)
    with pytest.raises(UserError, match=r"none of the 3 images.*0/a\.jpg.*replace") as error:
        Stream(source, 2, seed=0).next()
    assert "\n" not in str(error.value)


def test_one_readable_image_is_enough_for_a_stream(tmp_path: Path, digits_model: nn.Module) -> None:
    corrupt(make_folder(tmp_path, {"0": 1}))
    batch = Stream(open_source(str(tmp_path), digits_model), 5, seed=0).next()
    assert batch.images.shape == (5, 1, 8, 8)
    assert (batch.images == batch.images[0]).all()
