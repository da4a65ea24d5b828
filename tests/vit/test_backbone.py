"""Nobody decides, nothing changes; and what the stages refuse."""

from dataclasses import replace
from unittest import mock

import pytest
import timm
import torch
from torch.testing import assert_close

from tokenenv.errors import UserError
from tokenenv.game.episode import EXECUTIONS, Episode
from tokenenv.game.rules import LayerMerge, TokenPrune
from tokenenv.vit import blocks, layout
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.packing import compact, pack, unpack
from tokenenv.vit.reduction import prune

# One of each kind, narrowed and shortened so that the suite stays fast.
SMALL = {"embed_dim": 64, "depth": 4, "num_heads": 4, "num_classes": 7, "img_size": 112}
FAMILY = {
    "vit": ("vit_tiny_patch16_224", {}),
    "deit": ("deit_tiny_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "layer scale, class token without position": ("deit3_small_patch16_224", {}),
    "registers (DINOv2)": ("vit_small_patch14_reg4_dinov2", {}),
    "pre-norm (CLIP)": ("vit_base_patch32_clip_224", {"img_size": 224}),
    "average pooling, no class token": ("vit_medium_patch16_gap_256", {}),
    "attention pooling (SigLIP)": ("vit_base_patch16_siglip_224", {}),
    "register, average pooling": ("vit_wee_patch16_reg1_gap_256", {}),
    "qk-norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "scale norm": ("vit_tiny_patch16_224", {"scale_attn_norm": True, "scale_mlp_norm": True}),
    "average and max pooling": (
        "vit_tiny_patch16_224",
        {"global_pool": "avgmax", "class_token": True},
    ),
    "max pooling": ("vit_tiny_patch16_224", {"global_pool": "max"}),
    "small image, other patch": ("vit_tiny_patch16_224", {"img_size": (32, 48), "patch_size": 8}),
    "dynamic image size": ("vit_tiny_patch16_224", {"dynamic_img_size": True}),
}


def family_model(kind: str) -> Backbone:
    name, options = FAMILY[kind]
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL, **options})
    # Fresh models are too tidy (zero heads, layer scale 1e-5): shake everything.
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return Backbone(model)


def image_for(backbone: Backbone, batch: int = 2) -> torch.Tensor:
    height, width = backbone.model.patch_embed.img_size
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=FAMILY, scope="module")
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return family_model(request.param)


def rules_for(backbone: Backbone) -> TokenPrune:
    features = ("token", "position", "progress", "similarity", "norm", "agent_id")
    if backbone.has_class_token:
        features += ("cls_attention", "redundancy")
    return TokenPrune(blocks=(1, 2, 3), features=features)


@torch.inference_mode()
def run(backbone: Backbone, images: torch.Tensor, keep, execution: str) -> Episode:
    """``keep``: a function of the observation, as a policy is."""
    episode = Episode(backbone, rules_for(backbone), images, execution=execution)
    while not episode.done:
        episode.act(keep(episode.observe(state=True)))
    return episode


def everything(seen):
    return torch.ones_like(seen.active, dtype=torch.long)


def by_content(seen):
    """A rule of the content alone: decisions must not depend on execution or neighbours."""
    score = seen.feature("norm")[..., 0] + 3 * seen.feature("token")[..., 0]
    mean = (score * seen.active).sum(1, keepdim=True) / seen.active.sum(1, keepdim=True)
    # Images differ in how many tokens they keep.
    return (score >= mean + (7 * mean).sin()).long()


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_keeping_everything_gives_timms_logits(backbone: Backbone, execution: str) -> None:
    images = image_for(backbone)
    with torch.inference_mode():
        expected = backbone.model(images)
    episode = run(backbone, images, everything, execution)
    assert_close(episode.logits, expected, atol=1e-5, rtol=0)
    assert expected.std() > 1e-3


@pytest.mark.parametrize("execution", ["padded", "packed"])
def test_masked_equals(backbone: Backbone, execution: str) -> None:
    images = image_for(backbone, 5)
    masked = run(backbone, images, by_content, "masked")
    other = run(backbone, images, by_content, execution)
    assert torch.equal(masked.tokens.patch_alive(), other.tokens.patch_alive())
    left = masked.tokens.patch_alive().sum(1)
    assert 0 < left.max() < backbone.patches and len(left.unique()) > 1
    assert_close(masked.logits, other.logits, atol=1e-4, rtol=0)
    assert torch.equal(torch.stack(masked.fed), torch.stack(other.fed))


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_block_that_takes_its_tokens_in_portions_is_the_same(
    backbone: Backbone, execution: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = image_for(backbone, 5)
    whole = run(backbone, images, by_content, execution)
    monkeypatch.setattr(layout, "ROWS", 7)
    monkeypatch.setattr(blocks, "_NUMBERS", 0)
    last = backbone.blocks[-1]
    with (
        mock.patch.object(last.mlp, "forward", wraps=last.mlp.forward) as mlp,
        mock.patch.object(last.attn.qkv, "forward", wraps=last.attn.qkv.forward) as qkv,
    ):
        parts = run(backbone, images, by_content, execution)
    assert_close(parts.logits, whole.logits, atol=1e-5, rtol=0)
    assert len(mlp.mock_calls) > 1 and len(qkv.mock_calls) > 1


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("proportional", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_portions_tell_decisions_the_same(
    execution: str, proportional: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "ROWS", rows)  # without effect while there are few numbers
    backbone = family_model("deit")
    rules = LayerMerge((0, 1))
    with torch.no_grad():
        episode = Episode(backbone, rules, image_for(backbone, 7), execution=execution)
        accept = torch.arange(99) < torch.tensor([0, 3, 99, 0, 11, 99, 5])[:, None]
        episode.act(accept[:, : rules.agents(backbone)].long())
    tokens = episode.tokens
    assert tokens.ragged and tokens.merged
    names = ("keys", "mean_keys", "cls_attention", "value_norms", "matrix", "embeddings")
    wanted = dict.fromkeys(names, True)
    with torch.no_grad():
        whole, told = backbone.attend(1, tokens, proportional=proportional, **wanted)
        monkeypatch.setattr(blocks, "_NUMBERS", 0)
        parts, heard = backbone.attend(1, tokens, proportional=proportional, **wanted)
    assert_close(parts.x, whole.x)
    for name, values in vars(told).items():
        assert values is not None
        assert_close(getattr(heard, name), values, msg=name)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_an_image_does_not_feel_its_neighbours(backbone: Backbone, execution: str) -> None:
    images = image_for(backbone, 6)
    together = run(backbone, images, by_content, execution)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = run(backbone, images[order], by_content, execution)
    assert_close(shuffled.logits, together.logits[order], atol=1e-4, rtol=0)
    for i in range(3):
        alone = run(backbone, images[i : i + 1], by_content, execution)
        assert_close(alone.logits, together.logits[i : i + 1], atol=1e-4, rtol=0)
        assert torch.equal(alone.tokens.patch_alive()[0], together.tokens.patch_alive()[i])


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_one_image_loses_all_and_one_none(backbone: Backbone, execution: str) -> None:
    images = image_for(backbone, 3)

    def mixed(seen):
        action = everything(seen)
        action[0] = 0
        return action

    episode = run(backbone, images, mixed, execution)
    left = episode.tokens.patch_alive().sum(1).tolist()
    # Where the model can't do without visual tokens, the vote is void.
    assert (
        left
        == [backbone.patches if backbone.embed(images).keep_one else 0] + [backbone.patches] * 2
    )
    assert episode.logits.isfinite().all()
    with torch.inference_mode():
        assert_close(episode.logits[1:], backbone.model(images)[1:], atol=1e-4, rtol=0)


def test_pruned_tokens_have_no_influence(backbone: Backbone) -> None:
    """Change what the pruned patches show after they left: the logits must not move."""
    images = image_for(backbone, 2)
    with torch.inference_mode():
        tokens = backbone.embed(images)
        keep = torch.rand(2, backbone.patches, generator=torch.Generator().manual_seed(2)) < 0.6
        from tokenenv.vit import reduction

        def finish(tokens):
            for block in range(backbone.depth):
                tokens, _ = backbone.attend(block, tokens)
                tokens = backbone.feed(block, tokens)
            return backbone.classify(tokens)

        pruned = reduction.prune(tokens, keep)
        noisy = torch.where(pruned.alive[..., None], pruned.x, torch.randn_like(pruned.x) * 100)
        assert_close(finish(pruned.with_x(noisy)), finish(pruned), atol=1e-5, rtol=0)


def test_class_attention_is_the_softmax_row() -> None:
    backbone = family_model("deit")
    with torch.inference_mode():
        tokens = backbone.embed(image_for(backbone))
        _, context = backbone.attend(0, tokens, keys=True, mean_keys=True, cls_attention=True)
        block = backbone.model.blocks[0]
        qkv = block.attn.qkv(block.norm1(tokens.x)).reshape(2, -1, 3, 4, 16).permute(2, 0, 3, 1, 4)
        full = (qkv[0] @ qkv[1].transpose(2, 3) * 16**-0.5).softmax(-1)
    assert_close(context.cls_attention, full[:, :, 0].mean(1), atol=1e-6, rtol=1e-5)
    assert_close(context.keys, qkv[1])
    assert_close(context.mean_keys, qkv[1].mean(1))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("swin_tiny_patch4_window7_224", {}, "SwinTransformer is not timm's VisionTransformer"),
        ("vit_pwee_patch16_reg1_gap_256", {}, "block 0 is a ParallelScalingBlock"),
        ("vit_tiny_patch16_224", {"num_classes": 0}, "no classifier head"),
        ("vit_tiny_patch16_224", {"global_pool": ""}, "global_pool=''"),
        ("vit_tiny_patch16_224", {"patch_drop_rate": 0.5}, "drops patches while it is trained"),
        ("vit_dwee_patch16_reg1_gap_256", {}, "DiffAttention"),
    ],
)
def test_unsupported_models_are_refused(name: str, options: dict, words: str) -> None:
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    with pytest.raises(UserError, match=words):
        Backbone(timm.create_model(name, **options))


def test_half_precision_stays_finite() -> None:
    backbone = family_model("deit").to(torch.bfloat16)
    images = image_for(backbone, 2).to(torch.bfloat16)
    for execution in EXECUTIONS:
        episode = run(backbone, images, by_content, execution)
        assert episode.logits.dtype == torch.bfloat16
        assert episode.logits.isfinite().all()


@pytest.mark.parametrize("kept", ["all", "as many of every image", "a number of its own"])
@pytest.mark.parametrize("merged", [False, True])
@torch.no_grad()
def test_a_whole_block_is_its_two_halves(backbone: Backbone, kept: str, merged: bool) -> None:
    tokens = backbone.embed(image_for(backbone))
    keep = torch.ones_like(tokens.visual_alive)
    if kept != "all":
        keep[:, 5:9] = False
        keep[1, 2] = kept == "as many of every image"
        tokens = prune(tokens, keep)
    if merged:
        tokens = replace(tokens, size=tokens.size * 2 * tokens.alive, merged=True)
    for layout_of in (compact, pack):
        before = layout_of(tokens)
        halves, _ = backbone.attend(1, before, proportional=True)
        whole = backbone.through(1, before, proportional=True)
        assert_close(unpack(whole).x, unpack(backbone.feed(1, halves)).x)
