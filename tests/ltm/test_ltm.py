"""LTM models: nothing merges, nothing changes; what merges, against plain loops; bad input."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import tokenenv.vit.digits  # noqa: F401  (registers digits_vit)
from tokenenv import UserError, ltm, open_source
from tokenenv.ltm.mask import merge
from tokenenv.vit.dense import evaluating
from tokenenv.vit.twin import differing_setting

SMALL: dict[str, tuple[str, dict[str, Any], float, int]] = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 96, "embed_dim": 48, "depth": 4}, 0.5, 96),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {
            "img_size": 56,
            "embed_dim": 48,
            "depths": (2, 4),
            "num_heads": (2, 4),
            "drop_path_rate": 0.0,  # the default drops a whole block now and then
        },
        25 / 49,
        56,
    ),
    "mobilevit": ("mobilevit_xxs", {}, 0.4, 160),
    "efficientvit": ("efficientvit_b0", {}, 0.5, 128),
}
"""Of each family a small model: timm's name, options, a ratio at which tokens merge, pixels."""

FAMILIES = pytest.mark.parametrize("family", SMALL)


def build(family: str, **options: Any) -> nn.Module:
    """A model whose BatchNorms and layer scales are not the identity."""
    name, own, _, _ = SMALL[family]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **own, **options).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def merged(family: str, ratio: float | None = None, **options: Any) -> ltm.LTM:
    _, _, own, pixels = SMALL[family]
    if family in ("mobilevit", "efficientvit"):
        options["image_size"] = pixels
    return ltm.ltm(build(family), own if ratio is None else ratio, **options)


def pictures(family: str, count: int = 2) -> Tensor:
    pixels = SMALL[family][3]
    return torch.randn(count, 3, pixels, pixels, generator=torch.Generator().manual_seed(1))


@FAMILIES
def test_ratio_one_is_timms_own_model(family: str) -> None:
    model, images = build(family), pictures(family)
    same = merged(family, 1.0)
    with torch.no_grad():
        assert torch.equal(same(images), model(images))
        assert torch.equal(same.forward_features(images), model.forward_features(images))
        pooled = same.forward_head(same.forward_features(images), pre_logits=True)
        assert torch.equal(same.get_classifier()(pooled), model(images))
    assert not any(stack.masks for stack in same.stacks)


@pytest.mark.parametrize(
    "options",
    [
        {"init_values": 0.3, "reg_tokens": 2},
        {"class_token": False, "global_pool": "avg"},
        {"qk_norm": True, "pre_norm": True},
    ],
)
def test_other_vits(options: dict[str, Any]) -> None:
    model, images = build("vit", **options), pictures("vit")
    with torch.no_grad():
        assert torch.equal(ltm.ltm(model, 1.0)(images), model(images))
    cut = ltm.ltm(model, 0.5)
    prefix = model.num_prefix_tokens
    assert cut.forward_features(images).shape == (2, prefix + 16, 48)


@FAMILIES
@pytest.mark.parametrize("mask", ["attention", "linear"])
def test_trains_and_costs_less(family: str, mask: ltm.MaskKind) -> None:
    model, images = merged(family, mask=mask), pictures(family)
    original = build(family)
    assert ltm.measure(model, images) < ltm.measure(original, images)
    assert ltm.measure(model, images) == ltm.measure(model, images[:1])

    if mask == "linear":  # the weights start at 0, as does their norm's gradient
        for stack in model.stacks:
            for module in stack.masks.values():
                nn.init.normal_(module.score.weight, std=0.1)
    logits = model.train()(images)
    assert logits.shape == (2, 7)
    torch.nn.functional.cross_entropy(logits, torch.tensor([1, 3])).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    dead = [
        name
        for name, p in model.named_parameters()
        if ".masks." in name and not name.endswith("bias") and not p.grad.abs().sum() > 0
    ]
    assert not missing
    # A ViT's head reads the class token only: what merges in its last block comes too late for it.
    last = "model.blocks.masks.3." if family == "vit" else "none"
    assert [name for name in dead if not name.startswith(last)] == []


@FAMILIES
def test_an_image_does_not_feel_its_neighbours(family: str) -> None:
    model, images = merged(family).eval(), pictures(family, 5)
    with torch.no_grad():
        alone = torch.cat([model(image[None]) for image in images])
        assert (model(images) - alone).abs().max() < 1e-5


@FAMILIES
def test_the_original_stays_as_it_is(family: str) -> None:
    model, images = build(family), pictures(family)
    with torch.no_grad():
        before = model(images)
        cut = ltm.ltm(model.train(), 1.0)
        assert cut.training
        assert all(m.training for m in model.modules())
        assert torch.equal(model.eval()(images), before)


@FAMILIES
def test_a_copy_is_independent(family: str) -> None:
    """As timm's EMA makes one."""
    model, images = merged(family).eval(), pictures(family)
    with torch.no_grad():
        twin = copy.deepcopy(model)
        before = twin(images)
        for p in model.parameters():
            p.zero_()
        assert torch.equal(twin(images), before)
        with twin.recording() as features:
            model(images)
            assert not features
            twin(images)
            assert features


def test_vit_block_by_plain_loops() -> None:
    model, images = merged("vit").eval(), pictures("vit")
    with torch.no_grad():
        vit = model.model
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
        grid, counts = (6, 6), []
        for index, block in enumerate(vit.blocks.blocks):
            z = x + block.attn(block.norm1(x))
            mask = vit.blocks.masks.at(index)
            side = round(6 * 0.5 ** ((index + 1) / 8))
            assert (mask is not None) == (side < grid[0])
            if mask is not None:
                g = mask(z[:, 1:], grid, (side, side), None)
                fewer = torch.zeros(2, side * side, 48)
                for image in range(2):
                    for token in range(side * side):
                        for n in range(grid[0] * grid[1]):
                            fewer[image, token] += g[image, n, token] * z[image, 1 + n]
                x, grid = torch.cat([z[:, :1], fewer], 1), (side, side)
            else:
                x = z
            x = x + block.mlp(block.norm2(x))
            counts.append(x.shape[1] - 1)
        assert counts == [36, 25, 25, 16]
        assert (vit.forward_head(vit.norm(x)) - model(images)).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["vit", "swin", "mobilevit"])
def test_similar_masks_train_and_feel_no_neighbours(family: str) -> None:
    ratio = 25 / 49 if family == "swin" else 0.5
    model, images = merged(family, ratio, mask="similar", blocks=(1,)), pictures(family, 3)
    assert sum(len(stack.masks) for stack in model.stacks) >= 1
    with torch.no_grad():
        alone = torch.cat([model.eval()(image[None]) for image in images])
        assert (model(images) - alone).abs().max() < 1e-5
    model(images).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(count > 0 for count in model.lengths)


def test_lengths_are_what_the_mlps_see() -> None:
    model, lengths = merged("vit", 0.4, mask="similar", blocks=(1, 2)).eval(), []
    for block in model.model.blocks.blocks:
        block.mlp.register_forward_hook(lambda m, i, out: lengths.append(out.shape[1] - 1))
    with torch.no_grad():
        model(pictures("vit"))
    assert lengths == model.lengths == [36, 23, 14, 14]


def test_linear_masks_leave_exactly_the_schedule() -> None:
    model, lengths = merged("vit", 0.6, mask="linear").eval(), []
    for block in model.model.blocks.blocks:
        block.mlp.register_forward_hook(lambda m, i, out: lengths.append(out.shape[1] - 1))
    with torch.no_grad():
        model(pictures("vit"))
    assert lengths == [round(36 * 0.6 ** ((block + 1) / 4)) for block in range(4)]


def test_swin_window_by_window() -> None:
    """Attention, shifts and positions are timm's; each window's MLP works on fewer tokens."""
    model = merged("swin").eval()
    stack = model.model.layers[0].blocks
    x = torch.randn(2, 14, 14, 48, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = x
        for index, block in enumerate(stack.blocks):
            side = (6, 5)[index]
            expected = expected + block._attn(block.norm1(expected))
            out = expected.clone()
            for row in (0, 7):
                for column in (0, 7):
                    part = expected[:, row : row + 7, column : column + 7].reshape(2, 49, 48)
                    g = stack.masks.at(index)(part, (7, 7), (side, side), None)
                    change = block.mlp(block.norm2(merge(g, part)))
                    share = g / g.sum(2, keepdim=True)
                    new = part + torch.einsum("bnp,bpd->bnd", share, change)
                    out[:, row : row + 7, column : column + 7] = new.reshape(2, 7, 7, 48)
            expected = out
        assert (stack(x) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["swin", "mobilevit", "efficientvit"])
def test_unmerging_gives_back_what_merging_averaged(family: str) -> None:
    """Where nothing happens to merged tokens, every token is what it was."""
    model, dense = merged(family).eval(), build(family)
    for one in (model, dense):
        for name, p in one.named_parameters():
            # MLPs everywhere; attention after the first merge would move merged tokens too.
            parts = (".mlp.fc2.", ".attn.proj.", ".local_module.main.point_conv.norm.")
            if any(part in name for part in (*parts, ".context_module.main.proj.norm.")):
                p.data.zero_()
        for module in one.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.zero_()
    with torch.no_grad():
        assert sum(len(stack.masks) for stack in model.stacks) >= 3
        images = pictures(family)
        assert (model(images) - dense(images)).abs().max() < 1e-5


def test_swins_drop_path_drops_images() -> None:
    model, seen = merged("swin"), []
    for stack in model.stacks:
        for block in stack.blocks:
            block.drop_path2.register_forward_hook(lambda m, i, out: seen.append(len(out)))
    model(pictures("swin", 3))
    assert seen == [3] * 6


@pytest.mark.parametrize("family", ["mobilevit", "efficientvit"])
def test_other_resolutions_and_oblong_images(family: str) -> None:
    model = merged(family).eval()
    for size in ((192, 192), (96, 160), (129, 65)):
        images = torch.randn(3, 3, *size)
        with torch.no_grad(), model.recording() as features:
            assert model(images).shape == (3, 7)
            shape = model.forward_features(images).shape
        assert shape == model.model.forward_features(images).shape
        assert all(len(feature) == 3 for feature in features)


def test_vits_of_other_sizes() -> None:
    model = ltm.ltm(build("vit", dynamic_img_size=True), 0.5).eval()
    with torch.no_grad():
        assert model.forward_features(torch.randn(2, 3, 128, 64)).shape == (2, 1 + 6 * 3, 48)
    fixed = ltm.ltm(build("vit", dynamic_img_size=True), 0.5, "linear").eval()
    with pytest.raises(UserError, match="linear mask has weights for 30 merged tokens"):
        fixed(torch.randn(2, 3, 128, 64))


@FAMILIES
def test_half_precision(family: str) -> None:
    model = merged(family).eval().to(torch.bfloat16)
    with torch.no_grad():
        logits = model(pictures(family).bfloat16())
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()

    model = merged(family).eval()
    with torch.no_grad():
        exact = model(pictures(family))
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(pictures(family))
    assert (rough - exact).abs().max() < 0.1 * exact.abs().max()


def test_recursion_and_hard_masks_run() -> None:
    model = merged("swin", recursive=True, hard=True)
    carries = [m.carry for stack in model.stacks for m in stack.masks.values()]
    logits = model(pictures("swin"))
    logits.sum().backward()
    # The last three blocks of the second stage all end at 6x6, 5x5, 5x5: one has a like before it.
    assert [c.grad is not None for c in carries].count(True) >= 1


def test_recording() -> None:
    model, images = merged("mobilevit").eval(), pictures("mobilevit", 3)
    with model.recording() as features:
        model(images)
    assert len(features) == sum(len(stack.masks) for stack in model.stacks)
    assert all(f.shape[0] == 3 and f.requires_grad for f in features)
    with model.recording("pooled") as features:
        logits = model(images)
    assert torch.equal(model.get_classifier()(features[0]), logits)
    with model.recording() as features:
        pass
    model(images)
    assert not features
    with pytest.raises(UserError, match="choose from blocks, pooled"), model.recording("x"):  # type: ignore[arg-type]
        pass


@FAMILIES
def test_saved_and_read_back(family: str, tmp_path: Path) -> None:
    name, _, ratio, pixels = SMALL[family]
    size = None if family in ("vit", "swin") else pixels
    model = ltm.ltm(timm.create_model(name, num_classes=5), ratio, image_size=size)
    model.train()
    ltm.save_ltm(model, tmp_path / "run")
    assert model.training
    twin = ltm.load_ltm(tmp_path / "run")
    assert twin.config == model.config
    images = torch.randn(1, 3, *model.config["image_size"])
    with torch.no_grad():
        assert torch.equal(twin(images), model.eval()(images))
    with pytest.raises(UserError, match="exists already"):
        ltm.save_ltm(model, tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        ltm.load_ltm(tmp_path / "run")
    with pytest.raises(UserError, match="holds no LTM model"):
        ltm.load_ltm(tmp_path)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"img_size": 64, "dynamic_img_size": True, "drop_rate": 0.2}),
        ("vit_tiny_patch16_224", {"img_size": 64, "drop_path_rate": 0.3, "attn_drop_rate": 0.1}),
        ("swin_tiny_patch4_window7_224", {"img_size": 56, "drop_path_rate": 0.0}),
    ],
)
def test_what_no_image_of_full_size_shows_is_saved(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = ltm.ltm(timm.create_model(name, num_classes=5, **options), 1.0)
    ltm.save_ltm(model, tmp_path / "run")
    assert not differing_setting(model, ltm.load_ltm(tmp_path / "run"))
    model.model.patch_embed.strict_img_size = not model.model.patch_embed.strict_img_size
    with pytest.raises(UserError, match=r"patch_embed\.strict_img_size is"):
        ltm.save_ltm(model, tmp_path / "other")


def test_what_cannot_be_read_back_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not what timm makes of"):
        ltm.save_ltm(merged("vit"), tmp_path / "run")  # embed_dim=48 is not vit_tiny's
    assert not any(tmp_path.iterdir())


def test_modes_are_restored() -> None:
    model = build("mobilevit")
    model.train()
    model.stages[0].eval()
    modes = [m.training for m in model.modules()]
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize(("mask", "least"), [("attention", 0.95), ("linear", 0.9)])
def test_a_pretrained_model_survives_the_surgery(mask: ltm.MaskKind, least: float) -> None:
    """The masks' start: an untrained LTM still reads digits (the dense model: 99 %)."""
    torch.manual_seed(0)
    model = ltm.ltm(timm.create_model("digits_vit", pretrained=True), 0.6, mask).eval()
    batch = open_source("digits", model, split="test").batch(torch.arange(0, 600, 4))
    with torch.no_grad():
        right = model(batch.images).argmax(1) == batch.labels
    assert right.float().mean() >= least


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("vit", {"ratio": 0.0}, "ratio=0.0"),
        ("vit", {"ratio": 1.1}, "at most 1"),
        ("vit", {"ratio": float("nan")}, "ratio=nan"),
        ("vit", {"mask": "convolution"}, "choose from attention, similar, linear"),
        ("vit", {"image_size": 224}, "made for 96x96"),
        ("swin", {"ratio": 0.75}, r"does not divide the 7x7 windows.*0.735 \(6x6\), 0.51 \(5x5\)"),
        ("swin", {"ratio": 0.001}, "does not divide"),
        ("vit", {"ratio": 0.2, "mask": "similar", "blocks": (2,)}, "at least half"),
        ("vit", {"blocks": (1, 4)}, "blocks: 4 is out of range.*0 to 3"),
        ("efficientvit", {"mask": "similar"}, "leaves no grid"),
        ("mobilevit", {"image_size": 16}, "32 pixels or more"),
        ("mobilevit", {"image_size": 0}, "image_size=0: give 32 pixels or more"),
    ],
)
def test_bad_arguments(family: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        ltm.ltm(build(family), **options)


def test_bad_models() -> None:
    with pytest.raises(UserError, match="no blocks for a ResNet"):
        ltm.ltm(timm.create_model("resnet10t"))
    with pytest.raises(UserError, match="LTM blocks already"):
        ltm.ltm(merged("vit"))
    with pytest.raises(UserError, match="patch_drop_rate=0"):
        ltm.ltm(build("vit", patch_drop_rate=0.2))
    with pytest.raises(UserError, match="block 0, a ResPostBlock"):
        model = build("vit")
        model.blocks[0] = timm.models.vision_transformer.ResPostBlock(48, 3)
        ltm.ltm(model)
    with pytest.raises(UserError, match="7x7 windows don't divide the 20x20 tokens"):
        options = {**SMALL["swin"][1], "img_size": 80}
        ltm.ltm(timm.create_model("swin_tiny_patch4_window7_224", **options))
