"""MSTM: the mergence, and the second scale."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import timm
import torch
from helpers import backbone, source
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from agents.policies import load_policy
from agents.policies.words import parse_policy
from tokenenv.deploy.compressed import compress, load_compressed
from tokenenv.errors import UserError
from tokenenv.game.cost import Cost, measured_macs
from tokenenv.game.policy import play
from tokenenv.reducers import MSTM
from tokenenv.vit import reduction
from tokenenv.vit.backbone import Backbone, Context
from tokenenv.vit.load import load_backbone, load_model
from tokenenv.vit.multiscale import MultiScaleEmbed, add_scale
from tokenenv.vit.tokens import Tokens

VARIANTS = [
    MSTM((1,), 0.5),
    MSTM((1,), 0.4, "mean"),
    MSTM((1,), 0.4, "size", "tokens"),
    MSTM((1,), 0.3, "soft"),
    MSTM((1,), 0.3, "importance", "keys", 0.2),
    MSTM((1,), 0.3, "soft", "tokens", 0.2),
]


def state(seed: int, batch: int = 3, visual: int = 11, prefix: int = 2) -> tuple[Tokens, Context]:
    """Random tokens of which some died and some merged before, and a context."""
    rng = torch.Generator().manual_seed(seed)
    count = prefix + visual
    tokens = Tokens.start(torch.randn(batch, count, 8, generator=rng), prefix)
    keep = torch.rand(batch, visual, generator=rng) < 0.8
    keep[:, 0] = True
    tokens = reduction.prune(tokens, keep)
    match = reduction.bipartite_match(tokens, tokens.x)
    tokens = reduction.merge(tokens, match, reduction.strongest(match, 1))
    attention = torch.rand(batch, count, generator=rng) * tokens.alive
    keys = torch.randn(batch, count, 4, generator=rng)
    return tokens, Context(mean_keys=keys, cls_attention=attention)


def by_hand(rules: MSTM, tokens: Tokens, context: Context, image: int) -> dict[int, tuple]:
    """Embedding, size and patches of each visual token that is left, token by token."""
    assert context.cls_attention is not None and context.mean_keys is not None
    weight = context.cls_attention[image]
    alive = [i for i in range(tokens.prefix, tokens.x.shape[1]) if tokens.alive[image, i]]
    best = sorted(alive, key=lambda i: -weight[i].item())
    crucial = best[: math.ceil(rules.keep * len(alive) - 1e-6)]
    metric = context.mean_keys[image] if rules.similarity == "keys" else tokens.x[image]

    def cosine(i: int, j: int) -> float:
        a, b = metric[i].double(), metric[j].double()
        return (a @ b / (a.norm() * b.norm())).item()

    def share(i: int) -> float:
        values = {"mean": 1.0, "size": tokens.size[image, i].item()}
        return values.get(rules.weight, weight[i].item())

    shares = {c: [(share(c), c)] for c in crucial}
    size = {c: tokens.size[image, c].item() for c in crucial}
    patches = {c: {c} for c in crucial}
    for j in set(alive) - set(crucial):
        nearest = max(crucial, key=lambda c: cosine(j, c))
        if cosine(j, nearest) < rules.least:
            continue
        size[nearest] += tokens.size[image, j].item()
        patches[nearest].add(j)
        if rules.weight == "soft":
            total = sum(math.exp(cosine(j, c) / 0.1) for c in crucial)
            for c in crucial:
                shares[c].append((share(j) * math.exp(cosine(j, c) / 0.1) / total, j))
        else:
            shares[nearest].append((share(j), j))

    def mean(c: int) -> Tensor:
        whole = sum(w for w, _ in shares[c])
        return sum(w * tokens.x[image, i].double() for w, i in shares[c]) / whole  # type: ignore[return-value]

    owners = {
        c: {p for p, owner in enumerate(tokens.source[image].tolist()) if owner in patches[c]}
        for c in crucial
    }
    return {c: (mean(c), size[c], owners[c]) for c in crucial}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(VARIANTS))
def test_mergence_is_what_plain_loops_give(seed: int, rules: MSTM) -> None:
    tokens, context = state(seed)
    out = rules.reduce(tokens, context, 0)
    for image in range(len(tokens.x)):
        expected = by_hand(rules, tokens, context, image)
        left = [i for i in range(tokens.prefix, out.x.shape[1]) if out.alive[image, i]]
        assert set(left) == set(expected)
        for i, (mean, size, patches) in expected.items():
            torch.testing.assert_close(out.x[image, i].double(), mean, rtol=1e-4, atol=1e-5)
            assert out.size[image, i].item() == pytest.approx(size)
            assert set(torch.where(out.source[image] == i)[0].tolist()) == patches
    assert torch.equal(out.x[:, : tokens.prefix], tokens.x[:, : tokens.prefix])


def images(count: int = 5) -> Tensor:
    return source().batch(torch.arange(count) * 7).images


SPECS = [
    "mstm:keep=0.5,blocks=1/3/4",
    "mstm:keep=0.6,blocks=2/4,weight=soft",
    "mstm:keep=0.4,blocks=1/2,weight=size,similarity=tokens",
    "mstm:keep=0.5,blocks=1/3,least=0.5",
    "evit:keep=0.5,blocks=1/3",
    "evit:keep=0.5,blocks=1/3,fuse=0",
]


@pytest.mark.parametrize("what", SPECS)
@torch.inference_mode()
def test_executions_and_neighbours_make_no_difference(what: str) -> None:
    model, policy = backbone(), parse_policy(what, 6)
    batch = images()
    found = {how: play(model, policy, batch, how) for how in ("masked", "padded", "packed")}
    for how, episode in found.items():
        assert episode.logits is not None
        torch.testing.assert_close(episode.logits, found["masked"].logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(episode.counts[-1], found["masked"].counts[-1]), how
    for i in range(len(batch)):
        alone = play(model, policy, batch[i : i + 1]).logits
        torch.testing.assert_close(alone[0], found["masked"].logits[i], rtol=1e-4, atol=1e-4)
    tokens = found["masked"].tokens
    if "least" not in what and "fuse=0" not in what:
        assert torch.equal(tokens.size[:, 1:].sum(1), torch.full((len(batch),), 64.0))
        assert tokens.alive.gather(1, tokens.source).all()


@pytest.mark.parametrize("what", ["mstm:keep=1", "mstm:keep=1,weight=soft", "evit:keep=1"])
@torch.inference_mode()
def test_nothing_leaves_nothing_changes(what: str) -> None:
    batch = images()
    logits = play(backbone(), parse_policy(what, 6), batch).logits
    torch.testing.assert_close(logits, backbone()(batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("weight", ["importance", "soft"])
def test_macs_are_those_executed(weight: str) -> None:
    rules = MSTM((2,), 0.5, weight)  # type: ignore[arg-type]
    with torch.no_grad():
        tokens = backbone().embed(images(1))
        tokens, context = backbone().attend(2, tokens, **rules.wants(2))
    executed = measured_macs(lambda: rules.reduce(tokens, context, 0))
    claimed = rules.macs(backbone(), 2, torch.tensor([65.0])).item()
    # Beside the products: the class token's row, read in attention, and the plain means.
    others = 65 * 48 + (32 * 48 if weight == "importance" else 0)
    assert claimed == executed + others


def test_a_reducer_is_saved_and_remade(tmp_path: Path) -> None:
    policy = parse_policy("mstm:keep=0.6,blocks=1/3,weight=soft,similarity=tokens,least=0.25", 6)
    assert isinstance(policy, MSTM)
    policy.save(tmp_path / "policy.safetensors")
    assert load_policy(tmp_path / "policy.safetensors") == policy


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("mstm:keep=0", "keep ratio 0"),
        ("mstm:keep=0.5,weight=heavy", "weight=heavy: choose from importance"),
        ("mstm:keep=0.5,similarity=hue", "similarity=hue: choose from keys"),
        ("mstm:keep=0.5,least=2", "least=2"),
        ("mstm:blocks=1", "needs keep"),
        ("mstm:keep=0.5,blocks=3/1", "blocks=3/1"),
        ("mstm:keep=0.5,colour=1", "colour"),
        ("evit:keep=0.5,fuse=maybe", "fuse=maybe"),
    ],
)
def test_bad_specs_name_what_is_wrong(what: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        parse_policy(what, 6)


def test_a_model_without_class_token_is_refused() -> None:
    model = timm.create_model("digits_vit", depth=4, class_token=False, global_pool="avg")
    with pytest.raises(UserError, match="class token"):
        parse_policy("mstm:keep=0.5", 4).reduction.check(Backbone(model))


MODELS = {
    "digits_vit": {"depth": 2},
    "vit_tiny_patch16_224": {"depth": 2, "img_size": 64},
    "vit_small_patch32_224": {"depth": 1, "img_size": 96, "dynamic_img_size": True},
}


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_a_second_scale_starts_as_nothing(name: str) -> None:
    """Also where the grid is odd (3 x 3), and where the embedding keeps rows and columns."""
    model = timm.create_model(name, **MODELS[name]).eval()
    two = copy.deepcopy(model)
    add_scale(two)
    two = copy.deepcopy(two)
    shape = (2, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    batch = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(two(batch), model(batch))
    assert torch.equal(Backbone(two)(batch), model(batch))
    torch.nn.init.eye_(two.patch_embed.gate.weight)
    assert not torch.allclose(two(batch), model(batch))

    width, patches = model.embed_dim, math.prod(model.patch_embed.grid_size)
    coarse = two.patch_embed.coarse
    per_patch = coarse.in_channels * math.prod(coarse.kernel_size) * width
    grid = math.prod(-(-side // 2) for side in model.patch_embed.grid_size)
    extra = Cost(Backbone(two)).dense() - Cost(Backbone(model)).dense()
    assert extra == grid * per_patch + patches * width * width


@torch.inference_mode()
def test_the_scales_lie_over_each_other() -> None:
    """A bright coarse patch shows in the four fine tokens that it covers, most of all."""
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=128).eval()
    embed = MultiScaleEmbed(model.patch_embed)
    embed.norm_coarse = torch.nn.Identity()  # type: ignore[assignment]
    torch.nn.init.ones_(embed.coarse.weight)
    torch.nn.init.zeros_(embed.coarse.bias)
    torch.nn.init.eye_(embed.gate.weight)
    picture = torch.zeros(1, 3, 128, 128)
    picture[:, :, 32:64, 64:96] = 1.0  # row 1, column 2 of the coarse 4 x 4
    seen = (embed(picture) - embed.fine(picture))[0, :, 0].view(8, 8)
    strongest = seen.flatten().topk(4).indices.tolist()
    assert sorted(strongest) == [2 * 8 + 4, 2 * 8 + 5, 3 * 8 + 4, 3 * 8 + 5]


def test_weights_of_two_scales_are_recognised(tmp_path: Path) -> None:
    model = copy.deepcopy(load_backbone().model)
    add_scale(model)
    torch.nn.init.eye_(model.patch_embed.gate.weight)
    save_file(model.state_dict(), tmp_path / "two.safetensors")
    again = load_model("digits_vit", str(tmp_path / "two.safetensors"))
    batch = images(2)
    with torch.inference_mode():
        assert torch.equal(again(batch), model(batch))
    compress(model, parse_policy("mstm:keep=0.5", 12)).save(tmp_path / "fast")
    with torch.inference_mode():
        fast = load_compressed(tmp_path / "fast")
        expected = play(Backbone(model), parse_policy("mstm:keep=0.5", 12), batch).logits
        torch.testing.assert_close(fast(batch), expected, rtol=1e-4, atol=1e-4)


def test_a_second_scale_is_refused_where_it_can_not_be() -> None:
    model = timm.create_model("digits_vit", depth=1)
    add_scale(model)
    with pytest.raises(UserError, match="already"):
        add_scale(model)
    model.patch_embed = torch.nn.Identity()
    with pytest.raises(UserError, match="Identity"):
        add_scale(model)
