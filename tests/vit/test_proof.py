"""Nobody decides, nothing changes: a model whose own code the stages would leave out is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import tokenenv
from agents.policies.words import parse_policy
from tokenenv.errors import UserError
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.proof import own_code


class Normalising(timm.models.VisionTransformer):
    """A model that prepares its images itself."""

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return super().forward((x - 0.5) / 0.25, **options)


class OwnHead(timm.models.VisionTransformer):
    """A model that pools in its own way."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = x[:, 1:].amax(1) - x[:, 0]
        return pooled if pre_logits else self.head(pooled)


SMALL: dict[str, Any] = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3}


def small(cls: type[nn.Module] = timm.models.VisionTransformer) -> Any:
    torch.manual_seed(0)
    model = cls(**SMALL).eval()
    nn.init.normal_(model.head.weight)  # timm starts a head near zero
    return model


def patched() -> nn.Module:
    model = small()
    forward = model.forward
    model.forward = lambda x: forward(x * 2)
    return model


def hooked(place: Callable[[Any], nn.Module], pre: bool) -> nn.Module:
    model = small()
    if pre:
        place(model).register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    else:
        place(model).register_forward_hook(lambda module, inputs, output: output * 2)
    return model


CASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "normalises in forward": (lambda: small(Normalising), "Normalising overrides forward"),
    "pools by itself": (lambda: small(OwnHead), "OwnHead overrides forward_head"),
    "patched instance": (patched, "forward of the model is patched"),
    "pre-hook on the model": (
        lambda: hooked(lambda m: m, True),
        "the model has a forward pre-hook",
    ),
    "hook on a block": (
        lambda: hooked(lambda m: m.blocks[1], False),
        r"blocks\.1 has a forward hook",
    ),
    "hook on attention": (
        lambda: hooked(lambda m: m.blocks[0].attn, False),
        r"blocks\.0\.attn has a forward hook",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_own_code_is_refused_by_name(case: str) -> None:
    make, words = CASES[case]
    for use in (Backbone, lambda model: tokenenv.compress(model, parse_policy("tome:r=1", 2))):
        with pytest.raises(UserError, match=words) as mistake:
            use(make())
        assert "\n" not in str(mistake.value)


def test_a_hook_that_changes_nothing_is_no_reason() -> None:
    model, seen = small(), []
    model.blocks[0].mlp.register_forward_hook(lambda *args: seen.append(args[0]))
    backbone = Backbone(model)
    assert seen and own_code(model) == ["blocks.0.mlp has a forward hook"]
    assert backbone.depth == 2


def test_modes_and_generators_are_left_as_they_were() -> None:
    model = small()
    model.train()
    model.blocks[1].eval()
    before = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    Backbone(model, freeze=False)
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_that_are_not_finite_are_refused() -> None:
    model = small()
    model.blocks[0].mlp.fc1.weight.data[0, 0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        Backbone(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_prove_themselves(dtype: torch.dtype) -> None:
    assert Backbone(small().to(dtype)).dtype == dtype
