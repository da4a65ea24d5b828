"""Weights files as trainings write them; nothing in one is executed, nothing nonsensical loads."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tokenenv import UserError, load_backbone
from tokenenv.vit.checkpoint import read_weights
from tokenenv.vit.load import check_name, load_model

DINO = "vit_small_patch14_dinov2"
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def model() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model("test_vit", num_classes=10).eval()


@pytest.fixture
def state(model: Any) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def saved(what: Any, path: Path) -> str:
    torch.save(what, path)
    return str(path)


def refused(weights: str, name: str = "test_vit") -> str:
    with pytest.raises(UserError) as error:
        load_backbone(name, weights)
    assert "\n" not in str(error.value)
    return str(error.value)


def logits(module: nn.Module) -> Tensor:
    images = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return module(images)


def test_a_training_checkpoint_of_timm(model: Any, state: State, tmp_path: Path) -> None:
    arguments = argparse.Namespace(lr=0.1, model="test_vit", betas=(0.9, 0.99))
    checkpoint = {"epoch": 3, "arch": "test_vit", "state_dict": state, "args": arguments}
    checkpoint["optimizer"] = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []}
    loaded = load_model("test_vit", saved(checkpoint, tmp_path / "last.pth.tar"))
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "_orig_mod.module.", "module._orig_mod."]
)
def test_prefixes_of_wrappers(prefix: str, model: Any, state: State, tmp_path: Path) -> None:
    path = saved({prefix + name: t for name, t in state.items()}, tmp_path / "w.pth")
    assert torch.equal(logits(load_model("test_vit", path)), logits(model))


def test_the_prefix_of_a_compiled_model_is_that_one(model: Any, tmp_path: Path) -> None:
    path = saved(torch.compile(nn.DataParallel(model)).state_dict(), tmp_path / "w.pth")
    assert torch.equal(logits(load_model("test_vit", path)), logits(model))


@pytest.mark.parametrize(
    ("keys", "taken"),
    [
        (("state_dict", "state_dict_ema"), "state_dict_ema"),
        (("model", "model_ema"), "model_ema"),
        (("model", "state_dict"), "state_dict"),
        (("state_dict_ema",), "state_dict_ema"),
        (("model_ema",), "model_ema"),
        (("model",), "model"),
    ],
)
def test_of_several_the_one_timm_takes(
    keys: tuple[str, ...], taken: str, state: State, tmp_path: Path, capsys: Any
) -> None:
    held: dict[str, Any] = {
        key: {**state, "head.bias": torch.full((10,), float(i))} for i, key in enumerate(keys)
    }
    path = saved(held, tmp_path / "w.pth")
    loaded: Any = load_model("test_vit", path)
    theirs = timm.create_model("test_vit", num_classes=10, checkpoint_path=path)
    assert torch.equal(loaded.head.bias, theirs.head.bias)
    assert torch.equal(loaded.head.bias, held[taken]["head.bias"])
    told = capsys.readouterr().out
    if len(keys) == 1:
        assert told == ""
    else:
        other = next(key for key in keys if key != taken)
        assert told == f"weights '{path}': '{taken}' is taken; the file holds '{other}' too\n"


def test_an_average_that_is_none_is_none(state: State, tmp_path: Path, capsys: Any) -> None:
    path = saved({"state_dict": state, "state_dict_ema": None}, tmp_path / "w.pth")
    assert read_weights(Path(path)).keys() == state.keys()
    assert capsys.readouterr().out == ""


def test_a_whole_model_is_not_read(model: Any, tmp_path: Path) -> None:
    words = refused(saved(model, tmp_path / "w.pth"))
    assert "objects of timm." in words
    assert "save its state_dict()" in words


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def test_nothing_in_the_arguments_is_executed(state: State, tmp_path: Path) -> None:
    arguments = argparse.Namespace(evil=Evil(tmp_path / "executed"))
    words = refused(saved({"state_dict": state, "args": arguments}, tmp_path / "w.pth"))
    assert "mkdir" in words
    assert not (tmp_path / "executed").exists()


def test_the_same_name_with_and_without_a_prefix(state: State, tmp_path: Path) -> None:
    twice = {**state, "module.cls_token": state["cls_token"] + 1}
    assert "'cls_token' twice" in refused(saved(twice, tmp_path / "w.pth"))


@pytest.mark.parametrize("held", [{}, {"state_dict": [1]}, {"state_dict": {"a": 1}}, {3: 4}])
def test_what_holds_no_state_dict(held: Any, tmp_path: Path) -> None:
    assert "no state dict" in refused(saved(held, tmp_path / "w.pth"))


@pytest.mark.parametrize("name", ["test_vit", "deit_tiny_distilled_patch16_224"])
def test_another_image_size_and_head(name: str, tmp_path: Path, capsys: Any) -> None:
    tuned = timm.create_model(name, num_classes=7, img_size=96)
    weights = str(tmp_path / "w.safetensors")
    save_file(tuned.state_dict(), weights)
    backbone = load_backbone(name, weights)
    assert backbone.image_shape == (3, 96, 96)
    assert backbone.classes == 7
    assert backbone.grid == (6, 6)
    assert f"weights '{weights}' are for images of 96x96" in capsys.readouterr().out


def test_position_embeddings_of_no_square(state: State, tmp_path: Path) -> None:
    state["pos_embed"] = torch.zeros(1, 1 + 7, state["pos_embed"].shape[2])
    assert "pos_embed" in refused(saved(state, tmp_path / "w.pth"))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.full((10,), torch.nan), "NaN or infinite"),
        (torch.tensor([torch.inf] + [0.0] * 9), "NaN or infinite"),
        (torch.full((10,), 1e300, dtype=torch.float64), "NaN or infinite"),  # not in float32
        (torch.full((10,), torch.nan).to(torch.float8_e4m3fn), "NaN or infinite"),
        (torch.ones(10, dtype=torch.bool), "holds bool, not float32"),
        (torch.ones(10, dtype=torch.int64), "holds int64, not float32"),
        (torch.ones(10, dtype=torch.complex64), "holds complex64, not float32"),
        (torch.ones(10).to_sparse(), "sparse"),
        (torch.ones(10, device="meta"), "empty"),
    ],
)
def test_values_that_compute_nonsense(
    value: Tensor, words: str, state: State, tmp_path: Path
) -> None:
    found = refused(saved({**state, "head.bias": value}, tmp_path / "w.pth"))
    assert words in found
    assert "'head.bias'" in found
    assert "--weights" in found


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_another_precision_are_fine(
    dtype: torch.dtype, state: State, tmp_path: Path
) -> None:
    path = saved({name: t.to(dtype) for name, t in state.items()}, tmp_path / "w.pth")
    assert load_backbone("test_vit", path).dtype == torch.float32


@pytest.mark.parametrize(
    "name", [DINO, "vit_base_patch16_siglip_224", "vit_small_patch16_224.dino"]
)
def test_a_model_without_a_head_says_what_to_do(name: str) -> None:
    check_name(name)
    with pytest.raises(UserError) as error:
        load_backbone(name)
    assert str(error.value) == (
        f"timm's '{name}' has no classifier: give --weights FILE of one fine-tuned with a head, "
        "or --weights random to measure speed"
    )


def test_a_model_without_a_head_with_weights_that_have_one(tmp_path: Path) -> None:
    tuned = timm.create_model(DINO, num_classes=5, img_size=28)
    path = tmp_path / "tuned.safetensors"
    save_file(tuned.state_dict(), path)
    backbone = load_backbone(DINO, str(path))
    assert (backbone.classes, backbone.image_shape) == (5, (3, 28, 28))
    bare = {k: v for k, v in tuned.state_dict().items() if not k.startswith("head.")}
    save_file(bare, path)
    assert "'head.weight' is missing" in refused(str(path), DINO)


def test_a_model_without_a_head_untrained() -> None:
    assert load_backbone("vit_small_patch16_224.dino", "random").classes == 1000
