"""Which output of the model a class of the data means."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
from test_data import head, make_folder
from torch import nn

import tokenenv.vit.digits  # noqa: F401  registers digits_vit
from tokenenv.data import open_source
from tokenenv.data.labels import map_classes
from tokenenv.errors import UserError

WNIDS = timm.data.ImageNetInfo("imagenet-1k").label_names()


def test_wnids_mean_their_rank_on_an_imagenet_head() -> None:
    assert map_classes([WNIDS[999], WNIDS[2]], head(1000), "it") == [999, 2]
    twelve = timm.data.ImageNetInfo("imagenet-12k").label_names()
    assert map_classes([twelve[7000]], head(len(twelve)), "it") == [7000]


def test_an_unknown_wnid_is_an_error() -> None:
    with pytest.raises(UserError, match="n99999999"):
        map_classes([WNIDS[0], "n99999999"], head(1000), "it")


def test_wnids_on_a_head_of_their_own_are_in_order() -> None:
    assert map_classes(WNIDS[100:300], head(200), "it") == list(range(200))


def test_numbers_are_outputs() -> None:
    assert map_classes(["7", "10", "02"], head(11), "it") == [7, 10, 2]
    with pytest.raises(UserError, match="'10'"):
        map_classes(["7", "10", "2"], head(10), "it")


def test_two_classes_of_one_output_are_an_error() -> None:
    words = "it: classes '3' and '03' are both output 3 of the model: put their images"
    with pytest.raises(UserError, match=words):
        map_classes(["3", "5", "03"], head(10), "it")
    with pytest.raises(UserError, match="classes 'goldfish' and 'GoldFish' are both output 1 "):
        map_classes(["goldfish", "GoldFish"], head(1000), "it")


def test_a_models_own_labels_are_known() -> None:
    model = head(3, label_names=("red_fox", "Cat", "dog"), label_descriptions={"dog": "a hound"})
    assert map_classes(["A Hound", "Red Fox", "cat"], model, "it") == [2, 0, 1]
    assert map_classes(["CAT"], model, "it") == [1]
    # Names decide before the order of as many classes does.
    assert map_classes(["cat", "dog", "red fox"], model, "it") == [1, 2, 0]


def test_imagenets_names_are_known() -> None:
    assert map_classes(["goldfish", "Tinca_tinca", "great white shark"], head(1000), "it") == [
        1,
        0,
        2,
    ]
    assert map_classes([("no such", "Tench")], head(1000), "it") == [0]


def test_a_name_of_two_outputs_is_none() -> None:
    with pytest.raises(UserError, match="'crane'"):  # the bird and the machine
        map_classes(["goldfish", "crane"], head(1000), "it")


def test_as_many_classes_as_outputs_are_in_order(tmp_path: Path) -> None:
    model = timm.create_model("digits_vit", num_classes=3)
    source = open_source(str(make_folder(tmp_path, {"b": 1, "c": 0, "a": 2})), model)
    assert source.files == ["a/00.png", "a/01.png", "b/00.png"]
    assert source.labels.tolist() == [0, 0, 1]
    assert source.classes.tolist() == [0, 1]


def test_classes_that_do_not_fit_are_an_error(tmp_path: Path, digits_model: nn.Module) -> None:
    make_folder(tmp_path, {"zebra": 1, "1": 1})
    with pytest.raises(UserError, match=r"2 classes.*10 outputs.*'zebra'.*model trained") as error:
        open_source(str(tmp_path), digits_model)
    assert "\n" not in str(error.value)


def test_a_model_without_a_head_is_an_error() -> None:
    with pytest.raises(UserError, match="num_classes=0"):
        map_classes(["a"], head(0), "it")
