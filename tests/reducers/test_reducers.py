"""Published methods against plain loops over one image, and what all of them promise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import plain_reducers
import pytest
import torch
import torch.nn.functional as F
from helpers import executed_macs
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_reducers import cosine
from test_backbone import family_model, image_for
from torch import Tensor
from torch.testing import assert_close

from agents.policies import load_policy
from agents.policies.heuristics import decreasing
from agents.policies.words import parse_policy
from tokenenv import UserError, load_backbone, open_source
from tokenenv.game.cost import Cost
from tokenenv.game.episode import EXECUTIONS, Episode
from tokenenv.game.policy import play
from tokenenv.reducers import (
    ATC,
    ATS,
    MCTF,
    DiffRate,
    EViT,
    PiToMe,
    Reducer,
    RepresentationShift,
    ToFu,
    ZeroTPrune,
)
from tokenenv.vit import reduction
from tokenenv.vit.attention import matrix
from tokenenv.vit.backbone import Backbone, Context
from tokenenv.vit.tokens import Tokens

PREFIX, PATCHES, HEADS = 2, 15, 3


def some_tokens(seed: int) -> tuple[Tokens, Context]:
    """Three images whose tokens partly died, anywhere, and partly merged; none untouched."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(3, *shape, generator=generator)

    count = PREFIX + PATCHES
    tokens = Tokens.start(rand(count, 4) - 0.5, PREFIX)
    match = reduction.bipartite_match(tokens, rand(count, 3))
    tokens = reduction.merge(tokens, match, rand(match.score.shape[1]) < 0.3)
    tokens = reduction.prune(tokens, rand(PATCHES) < 0.8, least=2)
    weights = (rand(HEADS, count, count) * 3).exp() * tokens.alive[:, None, None]
    attention = weights / weights.sum(-1, keepdim=True)
    return tokens, Context(
        mean_keys=rand(count, 3) - 0.4,
        cls_attention=attention[:, :, 0].mean(1),
        value_norms=rand(count),
        attention=attention,
        embeddings=rand(count, 4) - 0.5,
    )


@dataclass
class One:
    """One image, token by token; what plain loops work on."""

    x: dict[int, Tensor]
    size: dict[int, float]
    patches: dict[int, set[int]]

    def prune(self, index: int) -> None:
        for table in (self.x, self.size, self.patches):
            table.pop(index)

    def merge(self, giver: int, taker: int) -> None:
        total = self.size[giver] + self.size[taker]
        mean = self.x[giver] * self.size[giver] + self.x[taker] * self.size[taker]
        self.x[taker], self.size[taker] = mean / total, total
        self.patches[taker] |= self.patches[giver]
        self.prune(giver)

    def groups(self) -> dict[frozenset[int], Tensor]:
        return {frozenset(self.patches[i]): self.x[i] for i in self.x}


def image(tokens: Tokens, b: int) -> One:
    living = [i for i in range(PREFIX, tokens.x.shape[1]) if tokens.alive[b, i]]
    source = tokens.source[b].tolist()
    return One(
        {i: tokens.x[b, i].clone() for i in living},
        {i: float(tokens.size[b, i]) for i in living},
        {i: {p for p, owner in enumerate(source) if owner == i} for i in living},
    )


def evit(one: One, about: dict[str, Tensor], reducer: EViT) -> None:
    row = about["cls_attention"].tolist()
    order = sorted(one.x, key=lambda i: -row[i])
    others = order[math.ceil(len(order) * reducer.keep - 1e-9) :]
    if reducer.fuse and others:
        first = others[0]
        total = sum(row[i] for i in others)
        mean = sum(row[i] * one.x[i].double() for i in others) / total
        one.x[first] = mean.float()
        one.patches[first] = set().union(*(one.patches[i] for i in others))
        others = others[1:]
    for i in others:
        one.prune(i)


def pitome(one: One, about: dict[str, Tensor], reducer: PiToMe) -> None:
    key, n = about["mean_keys"], len(one.x)
    m = 0.9 - 0.9 * reducer.blocks[0] / reducer.depth

    def f(c: float) -> float:
        return c - m if c >= m else reducer.alpha * (math.exp(c - m) - 1)

    energy = {i: sum(f(cosine(key[i], key[j])) for j in one.x if j != i) / n for i in one.x}
    k = n - math.ceil(n * reducer.keep - 1e-9)
    mergeable = sorted(one.x, key=lambda i: -energy[i])[: 2 * k]
    givers, takers = mergeable[::2], mergeable[1::2]
    best = {a: max(takers, key=lambda t: cosine(key[a], key[t])) for a in givers}
    for a in givers:
        one.merge(a, best[a])


def ats(one: One, about: dict[str, Tensor], reducer: ATS) -> None:
    weight = {i: float(about["cls_attention"][i]) * float(about["value_norms"][i]) for i in one.x}
    total, count, stays = sum(weight.values()), reducer.tokens[0], set()
    for k in range(count):
        quantile, running = (2 * k + 1) / (2 * count), 0.0
        for i in sorted(one.x):
            running += weight[i] / total
            if running >= quantile:
                stays.add(i)
                break
    for i in set(one.x) - stays:
        one.prune(i)


def zerotprune(one: One, about: dict[str, Tensor], reducer: ZeroTPrune) -> None:
    everyone = [*range(PREFIX), *one.x]
    n, squares = len(one.x), dict.fromkeys(everyone, 0.0)
    for graph in about["attention"].double():
        score = dict.fromkeys(everyone, 1 / len(everyone))
        for _ in range(reducer.rounds):
            score = {i: sum(float(graph[j, i]) * score[j] for j in everyone) for i in everyone}
        for i in everyone:
            squares[i] += score[i] ** 2
    order = sorted(one.x, key=lambda i: -squares[i])
    important, rest = order[: (n + 1) // 2], order[(n + 1) // 2 :]
    key = about["mean_keys"]
    gone = n - math.ceil(n * reducer.keep - 1e-9)
    likeness = {i: max(cosine(key[i], key[j]) for j in important) for i in rest}
    alike = sorted(rest, key=lambda i: -likeness[i])[: math.floor(gone * reducer.alike)]
    others = [i for i in order if i not in alike]
    for i in [*alike, *others[n - gone :]]:
        one.prune(i)


def diffrate(one: One, about: dict[str, Tensor], reducer: DiffRate) -> None:
    row = about["cls_attention"].tolist()
    order = sorted(one.x, key=lambda i: -row[i])
    rest = order[: max(len(order) - reducer.prune[0], 1)]
    left = rest[: max(len(rest) - reducer.merge[0], 1)]
    for i in order[len(rest) :]:
        one.prune(i)
    before = dict(one.x)
    for i in rest[len(left) :]:
        one.merge(i, max(left, key=lambda j: cosine(before[i], before[j])))


ByHand = Callable[[One, dict[str, Tensor], Reducer], None]
CASES: dict[str, tuple[ByHand, Callable[[float, int], Reducer]]] = {
    "evit": (evit, lambda keep, n: EViT((3,), keep)),  # type: ignore[dict-item]
    "evit, dropped": (evit, lambda keep, n: EViT((3,), keep, False)),  # type: ignore[dict-item]
    "pitome": (pitome, lambda keep, n: PiToMe((n,), 0.5 + keep / 2)),  # type: ignore[dict-item]
    "ats": (ats, lambda keep, n: ATS((3,), (2 * n + 1,))),  # type: ignore[dict-item]
    "zerotprune": (zerotprune, lambda keep, n: ZeroTPrune((3,), keep)),  # type: ignore[dict-item]
    "zerotprune, all by likeness": (
        zerotprune,  # type: ignore[dict-item]
        lambda keep, n: ZeroTPrune((3,), keep, 1.0, n + 1),
    ),
    "diffrate": (diffrate, lambda keep, n: DiffRate((3,), (n // 2,), (n,))),  # type: ignore[dict-item]
    "tofu, early": (plain_reducers.tofu, lambda keep, n: ToFu((3,), (n,))),
    "tofu, late": (plain_reducers.tofu, lambda keep, n: ToFu((3,), (n,), 3)),
    "atc": (plain_reducers.atc, lambda keep, n: ATC((3,), keep)),
    "mctf": (plain_reducers.mctf, lambda keep, n: MCTF((3,), (2 * n,))),
    "shift": (plain_reducers.shift, lambda keep, n: RepresentationShift((3,), keep)),
}


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), keep=st.floats(0.05, 1.0), n=st.integers(0, 8))
def test_what_plain_loops_say(case: str, seed: int, keep: float, n: int) -> None:
    by_hand, make = CASES[case]
    reducer = make(keep, n)
    tokens, context = some_tokens(seed)
    got = reducer.reduce(tokens, context, 0)
    assert torch.equal(got.x[:, :PREFIX], tokens.x[:, :PREFIX]) and got.alive[:, :PREFIX].all()
    for b in range(3):
        one = image(tokens, b)
        about = {name: v[b] for name, v in vars(context).items() if v is not None}
        about["alive"] = tokens.alive[b]
        by_hand(one, about, reducer)
        expected, found = one.groups(), image(got, b).groups()
        assert found.keys() == expected.keys()
        for patches, x in expected.items():
            assert_close(found[patches], x, atol=1e-5, rtol=1e-5)
    assert torch.equal(got.size[got.alive], _patches(got)[got.alive].float())
    gone = (got.source < 0) & (tokens.source >= 0)
    if isinstance(reducer, PiToMe | ATC | MCTF) or (isinstance(reducer, EViT) and reducer.fuse):
        assert not gone.any(), "who merges loses no patch"


def _patches(tokens: Tokens) -> Tensor:
    """``(B, N)`` how many patches name each token; 1 for the prefix."""
    ones = torch.ones_like(tokens.source)
    counts = torch.zeros_like(tokens.alive, dtype=torch.long)
    counts = counts.scatter_add(1, tokens.source.clamp(min=0), ones * (tokens.source >= 0))
    counts[:, :PREFIX] = 1
    return counts


SPECS = (
    "evit:keep=0.7,blocks=1/2", "evit:keep=0.6,blocks=0/2/3,fuse=0", "pitome:keep=0.8",
    "ats:tokens=20/9,blocks=1/2", "zerotprune:keep=0.7,blocks=0/2",
    "diffrate:prune=1/2/0/3,merge=3/0/2/1", "tome:r=5/4/0/1", "tome:r=3,schedule=decreasing",
    "tome:r=4,proportional=0", "tofu:r=5/4/3/1", "atc:keep=0.7,blocks=0/2", "mctf:r=7/4/3/2",
    "shift:keep=0.7,blocks=1/3",
)  # fmt: skip
NO_CLASS_TOKEN = [s for s in SPECS if not s.startswith(("evit", "ats", "diffrate"))]
KINDS = ("deit", "distilled", "registers (DINOv2)", "average and max pooling", "qk-norm",
         "average pooling, no class token", "attention pooling (SigLIP)",
         "register, average pooling")  # fmt: skip


def partition(tokens: Tokens) -> Tensor:
    """``(B, P, P)`` which patches share a token."""
    same = tokens.source[:, :, None] == tokens.source[:, None]
    return same & (tokens.source >= 0)[:, :, None]


@torch.inference_mode()
def run(backbone: Backbone, spec: str, images: Tensor, execution: str) -> Episode:
    policy = parse_policy(spec, backbone.depth)
    return play(backbone, policy, images, execution)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_all_executions_and_batches_agree(kind: str) -> None:
    backbone = family_model(kind)
    images = image_for(backbone, 4)
    for spec in SPECS if backbone.has_class_token else NO_CLASS_TOKEN:
        masked, *others = (run(backbone, spec, images, e) for e in EXECUTIONS)
        assert masked.logits is not None
        assert masked.counts[-1].max() < backbone.patches
        alone = [run(backbone, spec, one, "packed") for one in images.split(1)]
        for other in others:
            assert_close(other.logits, masked.logits, atol=1e-4, rtol=0)
            assert torch.equal(torch.stack(other.counts), torch.stack(masked.counts))
            assert torch.equal(partition(other.tokens), partition(masked.tokens))
        for i, one in enumerate(alone):
            assert_close(one.logits, masked.logits[i : i + 1], atol=1e-4, rtol=0)
            assert torch.equal(partition(one.tokens)[0], partition(masked.tokens)[i])
            assert one.tokens.alive[:, : backbone.prefix].all()


def test_images_differ_in_how_many_tokens_ats_keeps() -> None:
    backbone = load_backbone()
    images = open_source(None, backbone.model, limit=16).batch(torch.arange(16)).images
    masked, *others = (run(backbone, "ats:tokens=60", images, e) for e in EXECUTIONS)
    assert len(masked.counts[-1].unique()) > 4 and masked.counts[-1].max() < 60
    for other in others:
        assert_close(other.logits, masked.logits, atol=1e-4, rtol=0)
        assert torch.equal(torch.stack(other.counts), torch.stack(masked.counts))


@pytest.mark.parametrize("spec", ["evit:keep=1", "evit:keep=1,fuse=0", "pitome:keep=1",
                                  "zerotprune:keep=1", "diffrate:prune=0,merge=0", "tome:r=0",
                                  "ats:tokens=100000", "tofu:r=0", "atc:keep=1", "mctf:r=0",
                                  "shift:keep=1"])  # fmt: skip
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_nothing_to_do_gives_timms_logits(spec: str, execution: str) -> None:
    backbone = family_model("registers (DINOv2)")
    images = image_for(backbone, 2)
    episode = run(backbone, spec, images, execution)
    assert_close(episode.logits, backbone.model(images), atol=1e-5, rtol=0)
    assert episode.counts[-1].tolist() == [backbone.patches] * 2


@pytest.mark.parametrize("kind", ["distilled", "average pooling, no class token"])
def test_closed_form_agrees_with_torchs_counter(kind: str) -> None:
    """DiffRate's last block has one token left to merge into."""
    backbone = family_model(kind)
    image, cost = image_for(backbone, 1), Cost(backbone)
    specs = [*SPECS, "diffrate:prune=0,merge=20", "zerotprune:keep=0.1,rounds=2"]
    for spec in specs if backbone.has_class_token else NO_CLASS_TOKEN:
        if spec.startswith("tome"):  # the same in the tests of the cost of matching
            continue
        policy = parse_policy(spec, backbone.depth)
        episode = run(backbone, spec, image, "padded")
        counted = executed_macs(lambda policy=policy: play(backbone, policy, image, "padded"))
        assert cost.of(episode, policy).item() == pytest.approx(counted, rel=1e-9), spec


def test_the_whole_attention_is_that_of_the_class_row_and_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 6, 3, 4, generator=generator) for _ in range(3))
    mask = torch.tensor([[1, 1, 0, 1, 1, 0], [1] * 6], dtype=torch.bool)[:, None, None]
    weights = matrix(q, k, mask)
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), mask)
    assert_close(weights @ v.transpose(1, 2), expected)
    assert not weights[0, :, :, [2, 5]].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    backbone = family_model("deit").to(dtype)
    images = image_for(backbone, 2).to(dtype)
    for spec in SPECS:
        logits = run(backbone, spec, images, "packed").logits
        assert logits is not None and logits.dtype == dtype and logits.isfinite().all()
    backbone.float()


def test_schedules_of_tome() -> None:
    assert decreasing(8, 12) == (16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0)
    backbone = family_model("deit")
    images = image_for(backbone, 1)
    assert [int(n) for n in run(backbone, "tome:r=5/4/0/1", images, "padded").counts] == [
        49, 44, 40, 40, 39,
    ]  # fmt: skip
    constant = run(backbone, "tome:r=3", images, "padded")
    assert_close(run(backbone, "tome:r=3/3/3/3", images, "padded").logits, constant.logits)
    other = run(backbone, "tome:r=3,proportional=0", images, "padded")
    assert (other.logits - constant.logits).abs().max() > 1e-4


@pytest.mark.parametrize("spec", [*SPECS, "resize:size=96"])
def test_a_reducer_survives_the_disk(spec: str, tmp_path) -> None:
    policy = parse_policy(spec, 4)
    policy.save(tmp_path / "policy.safetensors")  # type: ignore[attr-defined]
    back = load_policy(tmp_path / "policy.safetensors")
    assert back == policy
    assert isinstance(back, Reducer) == isinstance(policy, Reducer)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("evit", "needs keep="),
        ("evit:keep=0", r"outside \(0, 1\]"),
        ("evit:keep=0.5,fuse=2", "fuse=2 must be 0 or 1"),
        ("evit:keep=0.5,r=3", "unknown argument 'r'"),
        ("evit:keep=0.5,blocks=3/3", "strictly increasing"),
        ("pitome:keep=0.4", "half of the tokens merge at most"),
        ("pitome:keep=0.9,alpha=0", "alpha=0 must be above 0"),
        ("pitome:keep=0.9,alpha=inf", "alpha=inf must be above 0, and finite"),
        ("ats", "needs tokens="),
        ("ats:tokens=0", "tokens=0/0/0: give whole numbers from 1"),
        ("ats:tokens=9/8", "2 numbers for 3 blocks"),
        ("ats:tokens=1.5", "tokens=1.5 is not a whole number"),
        ("zerotprune:keep=0.7,alike=2", "alike=2 is no share"),
        ("zerotprune:keep=0.7,rounds=0", "rounds=0"),
        ("diffrate:prune=4", "needs merge="),
        ("diffrate:prune=-1,merge=4,blocks=3", "prune=-1: give whole numbers from 0"),
        ("diffrate:prune=4/3,merge=4", "prune=4/3 gives 2 numbers for 12 blocks"),
        ("tome:r=8/6", "r=8/6 gives 2 numbers for 12 blocks"),
        ("tome:r=8,schedule=up", "schedule=up: choose from constant, decreasing"),
        ("tome:r=8/6,schedule=decreasing", "r takes one number"),
        ("tome:r=8,proportional=yes", "proportional=yes must be 0 or 1"),
        ("tome:r=8/-1,blocks=0/1", "r=-1 pairs to merge"),
        ("tofu", "needs r="),
        ("tofu:r=8,merge_from=-2", "merge_from=-2: give the index of a block"),
        ("atc:keep=0", r"outside \(0, 1\]"),
        ("mctf:r=8/6", "r=8/6 gives 2 numbers for 12 blocks"),
        ("mctf:r=-1", "give whole numbers from 0"),
        ("shift:keep=0.7,blocks=0/3", "no MLP runs before block 0"),
        ("resize", "needs size="),
        ("resize:size=192,blocks=3", "resize takes no blocks"),
        ("resize:size=0", "size=0 must be"),
    ],
)
def test_mistakes_are_named(spec: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_policy(spec, 12)


@pytest.mark.parametrize(
    ("spec", "kind", "words"),
    [
        ("evit:keep=0.7", "average pooling, no class token", "EViT reads the class token"),
        ("ats:tokens=9", "average pooling, no class token", "ATS reads the class token"),
        ("diffrate:prune=1,merge=1", "attention pooling (SigLIP)", "no class token"),
        ("evit:keep=0.7,blocks=2/9", "deit", "block 9 is out of range"),
        ("resize:size=100", "deit", "multiple of the patch size 16, 112 at most"),
        ("resize:size=128", "deit", "112 at most"),
        ("resize:size=32", "small image, other patch", "square"),
    ],
)
def test_what_does_not_fit_the_model(spec: str, kind: str, words: str) -> None:
    backbone = family_model(kind)
    with pytest.raises(UserError, match=words):
        parse_policy(spec, backbone.depth).reduction.check(backbone)


def test_the_margin_falls_over_the_models_own_depth() -> None:
    with pytest.raises(UserError, match="depth=4"):
        PiToMe((0, 1), depth=12).check(family_model("deit"))
