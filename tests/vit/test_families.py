"""Families of backbones: the registry, its errors, and families that are not the package's own."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import Block, ParallelScalingBlock, ResPostBlock
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.models.vision_transformer import VisionTransformer

import agents
from tokenenv import Backbone, UserError
from tokenenv.game.cost import Cost, measured_macs
from tokenenv.game.episode import EXECUTIONS
from tokenenv.measure.evaluation import play
from tokenenv.vit import blocks, families, layout
from tokenenv.vit.families import family_of, register_family
from tokenenv.vit.families.vision_transformer import VisionTransformerFamily
from tokenenv.vit.load import check_name

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/extend/own_family.py"


class ParallelFamily(VisionTransformerFamily):
    """Attention and MLP side by side: all of a block happens where attention is left."""

    name = "parallel"

    @classmethod
    def block_refusal(cls, i: int, block: Any) -> str | None:
        return None if type(block) is ParallelScalingBlock else f"block {i} is not parallel"

    @staticmethod
    def enter(block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        hidden, *qkv = block.in_proj(block.in_norm(x)).split(block.in_split, dim=-1)
        if block.mlp_bias is not None:
            hidden = hidden + block.mlp_bias
        q, k, v = (y.unflatten(-1, (block.num_heads, block.head_dim)) for y in qkv)
        return hidden, block.q_norm(q), block.k_norm(k), v

    @staticmethod
    def leave(block: Any, x: Tensor, h: Tensor, out: Tensor) -> Tensor:
        mlp = block.mlp_out_proj(block.mlp_drop(block.mlp_act(h)))
        return x + block.drop_path(block.ls(block.attn_out_proj(out.flatten(-2)) + mlp))

    @staticmethod
    def feed(block: Any, x: Tensor) -> Tensor:
        return x

    @property
    def parameter(self) -> nn.Parameter:
        return self.blocks[0].in_proj.weight

    def heads(self, block: int) -> tuple[int, int]:
        return self.blocks[block].num_heads, self.blocks[block].head_dim

    def attention_drop(self, block: int) -> float:
        return 0.0

    def normalised(self, block: int, x: Tensor) -> Tensor:
        return self.blocks[block].in_norm(x)

    def linear_layers(self, block: int) -> tuple[list[nn.Linear], list[nn.Linear]]:
        return [m for m in self.blocks[block].modules() if isinstance(m, nn.Linear)], []


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))


@pytest.fixture
def both(registry: None) -> None:
    """The example's family and one of parallel blocks."""
    runpy.run_path(str(EXAMPLE))
    register_family(ParallelFamily)


def model_of(kind: type[nn.Module], **options: Any) -> Any:
    torch.manual_seed(0)
    small = {"embed_dim": 64, "depth": 4, "num_heads": 4, "num_classes": 7, "img_size": 112}
    model = timm.create_model("vit_tiny_patch16_224", block_fn=kind, **small, **options).eval()
    # Fresh models are too tidy: shake everything.
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def images(batch: int = 3, size: int = 112) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def policy(words: str) -> Any:
    return agents.parse_policy(words, 4)


OTHERS = [ResPostBlock, ParallelScalingBlock]
POOLINGS = [{}, {"global_pool": "avg", "class_token": False}]


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("execution", EXECUTIONS)
@torch.inference_mode()
def test_keeping_everything_gives_the_models_logits(
    both: None, kind: type[nn.Module], pooling: dict[str, Any], execution: Any
) -> None:
    model = model_of(kind, **pooling)
    expected = model(images())
    episode = play(Backbone(model), policy("keep-all"), images(), execution)
    assert episode.logits is not None and expected.std() > 1e-3
    assert_close(episode.logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("words", ["merge-above:similarity=0.6", "norm:keep=0.6"])
@torch.inference_mode()
def test_masked_equals_padded_and_packed(
    both: None, kind: type[nn.Module], pooling: dict[str, Any], words: str
) -> None:
    backbone = Backbone(model_of(kind, **pooling))
    runs = [play(backbone, policy(words), images(), execution) for execution in EXECUTIONS]
    masked = runs[0]
    assert masked.logits is not None
    assert (masked.logits - backbone(images())).abs().max() > 1e-3
    assert words.startswith("norm") or len(masked.tokens.counts().unique()) > 1
    for other in runs[1:]:
        assert other.logits is not None
        assert_close(other.logits, masked.logits, atol=1e-4, rtol=0)
        assert torch.equal(other.tokens.patch_alive(), masked.tokens.patch_alive())


@pytest.mark.parametrize("kind", OTHERS)
def test_the_cost_is_what_is_executed(both: None, kind: type[nn.Module]) -> None:
    backbone = Backbone(model_of(kind))
    cost = Cost(backbone)
    assert cost.dense() == pytest.approx(measured_macs(lambda: backbone(images(1))), rel=1e-9)
    tome = policy("tome:r=5")
    with torch.no_grad():
        episode = play(backbone, tome, images(1), "padded")
        counted = measured_macs(lambda: play(backbone, tome, images(1), "padded"))
    assert cost.of(episode, tome).item() == pytest.approx(counted, rel=1e-9)
    assert counted < 0.9 * cost.dense()


@pytest.mark.parametrize("kind", OTHERS)
@torch.inference_mode()
def test_smaller_images(both: None, kind: type[nn.Module]) -> None:
    model = model_of(kind)
    backbone = Backbone(model)
    episode = play(backbone, policy("resize:size=64"), images())
    by_hand = model_of(kind)
    by_hand.set_input_size((64, 64))
    small = torch.nn.functional.interpolate(images(), (64, 64), mode="bicubic", antialias=True)
    assert episode.logits is not None
    assert_close(episode.logits, by_hand(small), atol=1e-5, rtol=0)


def test_attention_drops_in_training_only() -> None:
    backbone = Backbone(model_of(Block, attn_drop_rate=0.5), freeze=False)
    with torch.no_grad():
        tokens = backbone.embed(images())
        first, again = (backbone.attend(0, tokens)[0].x for _ in range(2))
        assert torch.equal(first, again)
        backbone.train()
        first, again = (backbone.attend(0, tokens)[0].x for _ in range(2))
    assert not torch.equal(first, again)


def test_an_unknown_model_is_told_what_each_family_misses(both: None) -> None:
    assert type(family_of(model_of(Block))) is VisionTransformerFamily
    model = model_of(ParallelScalingBlock)
    model.blocks[2] = model_of(Block).blocks[2]
    with pytest.raises(UserError) as caught:
        Backbone(model)
    assert str(caught.value) == (
        "model 'vit_tiny_patch16_224' is not supported: "
        "block 0 is a ParallelScalingBlock, not a Block, "
        "and block 0 is a ParallelScalingBlock, not a ResPostBlock, and block 2 is not parallel; "
        "use a model of timm's VisionTransformer family (ViT, DeiT, CLIP, DINOv2 ...), "
        "or register its family"
    )
    with pytest.raises(UserError, match="'Linear' is not supported: Linear is not timm's Vision"):
        family_of(nn.Linear(2, 2))


def test_another_librarys_class_of_the_same_name_is_told_apart() -> None:
    words = "VisionTransformer of torchvision.models.vision_transformer is not timm's"
    with pytest.raises(UserError, match=words):
        family_of(VisionTransformer(16, 8, 1, 1, 8, 8))


def test_a_registered_family_is_accepted_by_name(registry: None) -> None:
    with pytest.raises(UserError, match="block 0 is a ResPostBlock, not a Block"):
        check_name("vit_base_patch16_rpn_224")
    runpy.run_path(str(EXAMPLE))
    check_name("vit_base_patch16_rpn_224")


def test_a_name_is_registered_once(registry: None) -> None:
    register_family(ParallelFamily)
    again = type("ParallelFamily", (ParallelFamily,), {"__module__": __name__})
    register_family(again)  # as a notebook's cell that runs twice
    assert families.FAMILIES["parallel"] is again

    class Parallel2(VisionTransformerFamily):
        name = "parallel"

    with pytest.raises(UserError, match=r"family 'parallel' exists already, it is .*Parallel"):
        register_family(Parallel2)

    class Again(VisionTransformerFamily):
        pass

    with pytest.raises(UserError, match=r"'vision_transformer' .*: give .*Again another name"):
        register_family(Again)
    assert families.FAMILIES["vision_transformer"] is VisionTransformerFamily


def test_blocks_in_portions_are_the_same(both: None, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = Backbone(model_of(ParallelScalingBlock))
    with torch.inference_mode():
        whole = play(backbone, policy("tome:r=5"), images(), "packed").logits
        monkeypatch.setattr(layout, "ROWS", 7)
        monkeypatch.setattr(blocks, "_NUMBERS", 0)
        assert_close(play(backbone, policy("tome:r=5"), images(), "packed").logits, whole)
