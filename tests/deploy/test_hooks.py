"""Hooks on a compressed model: those that fire see whole batches, the others are told."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compressed_models import compressed, digits
from torch import nn

from tokenenv import UserError
from tokenenv.vit import blocks, layout

PLACES: dict[str, Callable[[Any], nn.Module]] = {
    "model": lambda model: model,
    "block": lambda model: model.blocks[4],
    "attention": lambda model: model.blocks[4].attn,
    "mlp": lambda model: model.blocks[4].mlp,
    "norm": lambda model: model.norm,
}


@pytest.mark.parametrize("execution", [None, "padded", "masked"])
@pytest.mark.parametrize("spec", ["norm:keep=0.6,blocks=3/6", "merge-above:similarity=0.8"])
@torch.inference_mode()
def test_hooks_fire_once_with_the_whole_batch(
    spec: str, execution: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "ROWS", 50)
    monkeypatch.setattr(blocks, "_NUMBERS", 0)
    fast = compressed(spec, digits(), execution)
    images = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = fast(images)
    left = [65] * 12

    def count(block: int, tokens: Any) -> None:
        left[block] = tokens.alive.shape[1]

    fast._play(images, count)
    seen: list[Any] = []
    for place, of in PLACES.items():
        module = of(fast.model)
        handles = [
            module.register_forward_pre_hook(lambda m, i: seen.append((m, i[0].shape))),
            module.register_forward_pre_hook(
                lambda m, i, k: seen.append((m, i[0].shape)), with_kwargs=True
            ),
            module.register_forward_hook(lambda m, i, o: seen.append((m, o.shape))),
            module.register_forward_hook(
                lambda m, i, k, o: seen.append((m, o.shape)), with_kwargs=True
            ),
        ]
        assert torch.allclose(fast(images), plain, atol=1e-5)
        assert [m for m, _ in seen] == [module] * 4, place
        sizes = [tuple(shape) for _, shape in seen]
        if place == "model":
            assert sizes == [(5, 1, 8, 8)] * 2 + [(5, 10)] * 2
        else:
            before = left[11] if place == "norm" else left[3]
            after = left[4] if place in ("block", "mlp") else before
            if place == "mlp":
                before = after
            assert sizes == [(5, before, 48)] * 2 + [(5, after, 48)] * 2, place
        for handle in handles:
            handle.remove()
        seen.clear()
        fast(images)
        assert not seen


@torch.inference_mode()
def test_what_hooks_see_is_what_the_model_computes() -> None:
    model = digits().eval()
    fast = compressed("keep-all", model)
    images = torch.randn(3, 1, 8, 8)
    found: list[list[torch.Tensor]] = [[], []]
    for each, store in zip((model, fast.model), found, strict=True):
        for of in PLACES.values():
            of(each).register_forward_hook(lambda m, i, o, store=store: store.extend((i[0], o)))
    model(images)
    fast(images)
    for mine, its in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(mine, its, atol=1e-5, rtol=0)


@pytest.mark.parametrize("place", ["model", "block", "attention"])
def test_a_hook_that_changes_something_is_refused(place: str) -> None:
    images = torch.randn(2, 1, 8, 8)
    for pre in (True, False):
        fast = compressed("norm:keep=0.6", digits())
        module = PLACES[place](fast.model)
        if pre:
            handle = module.register_forward_pre_hook(lambda m, i: (i[0] * 2,))
        else:
            handle = module.register_forward_hook(lambda m, i, o: o * 2)
        words = f"a hook on a {type(module).__name__} changes its {'input' if pre else 'output'}"
        with pytest.raises(UserError, match=words):
            fast(images)
        handle.remove()
        if pre:
            module.register_forward_pre_hook(lambda m, i: i)
        else:
            module.register_forward_hook(lambda m, i, o: o)
        assert fast(images).shape == (2, 10)


UNHEARD: dict[str, Callable[[Any], Any]] = {
    "attn_drop": lambda m: m.blocks[2].attn.attn_drop.register_forward_hook(print),
    "patch_drop": lambda m: m.patch_drop.register_forward_pre_hook(print),
    "blocks": lambda m: m.blocks.register_forward_hook(print),
    "backward of a block": lambda m: m.blocks[2].register_full_backward_hook(print),
    "backward of attention": lambda m: m.blocks[2].attn.register_full_backward_pre_hook(print),
    "backward of the model": lambda m: m.register_full_backward_hook(print),
}


@pytest.mark.parametrize("place", UNHEARD)
def test_a_hook_that_cannot_fire_is_told_once(
    place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fast = compressed("norm:keep=0.6", digits())
    images = torch.randn(2, 1, 8, 8)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        fast(images)
        assert not told
        UNHEARD[place](fast.model)
        fast(images)
        fast(images)
    assert len(told) == 1 and "hooks of this model don't fire" in str(told[0].message)
    assert capsys.readouterr().out == ""


def test_the_layers_backward_hooks_fire() -> None:
    fast = compressed("norm:keep=0.6", digits()).train()
    seen: list[torch.Size] = []
    fast.model.blocks[4].mlp.register_full_backward_hook(
        lambda m, before, after: seen.append(after[0].shape)
    )
    fast(torch.randn(2, 1, 8, 8)).sum().backward()
    assert seen == [(2, 65, 48)]
