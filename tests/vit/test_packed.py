"""Every image at its own length: the same decisions and logits as nothing moved, for all rules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_backbone import family_model, image_for
from torch import Tensor
from torch.testing import assert_close

import agents
from agents.policies.actor import ActorPolicy
from agents.policies.heuristics import RandomPrune
from agents.policies.words import parse_policy
from tokenenv import UserError
from tokenenv.game.episode import EXECUTIONS, Episode
from tokenenv.game.policy import play
from tokenenv.game.rules import LayerMerge, LayerPrune, Observation, Rules, TokenPrune
from tokenenv.vit import attention, packing, reduction
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.tokens import Packing, Tokens

KINDS = (
    "deit", "layer scale, class token without position", "registers (DINOv2)", "qk-norm",
    "average pooling, no class token", "attention pooling (SigLIP)", "register, average pooling",
)  # fmt: skip


@pytest.fixture(params=KINDS, scope="module")
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return family_model(request.param)


def rules_for(backbone: Backbone) -> list[Rules]:
    row = ("cls_attention",) if backbone.has_class_token else ()
    more = ("redundancy",) if backbone.has_class_token else ()
    rules: list[Rules] = [
        TokenPrune(blocks=(1, 2, 3), features=("token", "similarity", *row, *more)),
        LayerMerge(blocks=(0, 1, 2, 3), features=("similarity", *row, "size", "token", "keys")),
        LayerMerge(blocks=(0, 2), action="count", grid=(0, 2, 5, 9)),
        LayerPrune(blocks=(0, 1, 3), features=("keys", *row, *more)),
    ]
    if backbone.has_class_token:
        rules.append(LayerPrune(blocks=(1, 2), action="count", selector="redundancy"))
    return rules


def drawn(seed: int) -> Callable[[Observation], Tensor]:
    """Actions of an agent that depend on its image and itself alone, of every keep ratio."""

    def act(seen: Observation) -> Tensor:
        generator = torch.Generator().manual_seed(seed + seen.step)
        batch = len(seen.active)
        keep = torch.rand(batch, 1, generator=generator)
        keep[0], keep[1] = 0.0, 1.0  # the first image loses all it can, the second nothing
        score = torch.rand(batch, 4096, generator=generator)
        # Agents act by their rank among the active, wherever they lie.
        rank = (seen.active.cumsum(1) - 1).clamp(min=0)
        choice = score.gather(1, rank)
        if seen.legal is None:
            return (choice < keep).long()
        return (choice * seen.legal.sum(-1)).long()

    return act


@torch.inference_mode()
def run(
    backbone: Backbone,
    rules: Rules,
    images: Tensor,
    act: Callable[[Observation], Tensor],
    execution: str,
) -> Episode:
    episode = Episode.start(backbone, rules, images, execution=execution)  # type: ignore[arg-type]
    while not episode.done:
        episode.act(act(episode.observe(state=True)))
    return episode


def partition(tokens: Tokens) -> Tensor:
    """``(B, P, P)`` which patches share a token; a pruned one shares none."""
    same = tokens.source[:, :, None] == tokens.source[:, None]
    return same & (tokens.source >= 0)[:, :, None]


@pytest.mark.parametrize("index", range(5))
def test_all_executions_agree(backbone: Backbone, index: int) -> None:
    if index >= len(rules_for(backbone)):
        pytest.skip("needs a class token")
    rules = rules_for(backbone)[index]
    images = image_for(backbone, 6)
    masked, *others = (run(backbone, rules, images, drawn(3), e) for e in EXECUTIONS)
    lengths = masked.counts[-1]
    assert len(lengths.unique()) > 2 and lengths.min() < lengths.max()
    for other in others:
        assert_close(other.logits, masked.logits, atol=1e-4, rtol=0)
        assert torch.equal(torch.stack(other.counts), torch.stack(masked.counts))
        assert torch.equal(partition(other.tokens), partition(masked.tokens))
        assert other.tokens.packing is None


def test_a_batch_of_one_is_the_batch_of_64() -> None:
    backbone = family_model("deit")
    rules = TokenPrune(blocks=(1, 3), features=("norm",), share=False)
    images = image_for(backbone, 64)

    def by_content(seen: Observation) -> Tensor:
        score = seen.feature("norm")[..., 0]
        return (score > 3 * score.sum(1, keepdim=True).sin() * 0.1).long()

    together = run(backbone, rules, images, by_content, "packed")
    assert len(together.counts[-1].unique()) > 5
    for i in (0, 17, 63):
        alone = run(backbone, rules, images[i : i + 1], by_content, "packed")
        assert_close(alone.logits, together.logits[i : i + 1], atol=1e-4, rtol=0)
        assert torch.equal(alone.tokens.patch_alive()[0], together.tokens.patch_alive()[i])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_half_precision_stays_finite(dtype: torch.dtype, execution: str) -> None:
    backbone = family_model("deit").to(dtype)
    images = image_for(backbone, 4).to(dtype)
    for rules in rules_for(backbone):
        episode = run(backbone, rules, images, drawn(0), execution)
        assert episode.logits.dtype == dtype
        assert episode.logits.isfinite().all()


def test_finishing_early_is_the_same_in_every_execution() -> None:
    backbone = family_model("deit")
    rules = LayerMerge(blocks=(0, 1, 2))
    found = []
    for execution in EXECUTIONS:
        with torch.inference_mode():
            episode = Episode.start(backbone, rules, image_for(backbone, 5), execution=execution)
            episode.act(drawn(0)(episode.observe()))
            found.append(episode.finish(torch.tensor([0, 2, 4])))
    for logits in found[1:]:
        assert_close(logits, found[0], atol=1e-4, rtol=0)


def test_packing_and_unpacking_is_compacting() -> None:
    x = torch.randn(3, 9, 4, generator=torch.Generator().manual_seed(0))
    keep = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 0], [1] * 8, [0, 1, 1, 0, 0, 0, 1, 0]]) == 1
    tokens = reduction.prune(Tokens.start(x, prefix=1), keep)
    packed, compact = packing.pack(tokens), packing.compact(tokens)
    assert packed.packing is not None
    assert packed.packing.lengths == (1, 9, 4)
    assert torch.equal(packed.x, torch.cat([x[0, :1], x[1], x[2, [0, 2, 3, 7]]]))
    unpacked = packing.unpack(packed)
    for name in ("size", "alive", "source"):
        assert torch.equal(getattr(unpacked, name), getattr(compact, name)), name
    assert torch.equal(unpacked.x, compact.x * compact.alive[..., None])
    # Equally long images need no packing.
    even = reduction.prune(Tokens.start(x, prefix=1), torch.arange(8).expand(3, 8) < 5)
    assert packing.pack(even).packing is None
    assert packing.pack(even).x.shape == (3, 6, 4)


def test_a_ratio_per_image() -> None:
    backbone = family_model("deit")
    policy = parse_policy("random:keep=0.5..0.9,blocks=1/2,seed=4", backbone.depth)
    assert isinstance(policy, RandomPrune) and policy.keep == (0.5, 0.9)
    with torch.inference_mode():
        episode = play(backbone, policy, image_for(backbone, 32))
    first, second, third = (count.double() for count in episode.counts)
    ratio = second / first
    assert ratio.min() >= 0.5 and ratio.max() <= 0.92 and ratio.max() - ratio.min() > 0.3
    assert ((third / second - ratio).abs() < 0.06).all()  # the same again, rounded up
    for bad, words in {
        "0.9..0.5": "keep=0.9..0.5 must not fall",
        "0..0.5": "keep ratio 0 is outside",
        "0.5..": "keep= is not a number",
        "a..b": "keep=a is not a number",
    }.items():
        with pytest.raises(UserError, match=words):
            parse_policy(f"random:keep={bad}", 4)


def test_packed_tokens_merge_as_padded_ones_do() -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = Tokens.start(torch.randn(9, 24, 4, generator=generator), prefix=1)
    packed = packing.end_to_end(tokens)
    for step in range(4):
        match = reduction.bipartite_match(tokens, tokens.x)
        other = reduction.bipartite_match(packed, packing.unpack(packed).x)
        possible = match.score.isfinite()
        assert torch.equal(possible, other.score.isfinite())
        assert torch.equal(match.token[possible], other.token[possible])
        assert torch.equal(match.partner[possible], other.partner[possible])
        assert_close(match.score[possible], other.score[possible])
        # The first image merges all it can, the last one nothing.
        share = torch.linspace(1.0, 0.0, 9)[:, None]
        accept = torch.rand(match.score.shape, generator=generator) < share
        tokens = packing.compact(reduction.merge(tokens, match, accept))
        before = packed.x.clone()
        merged = reduction.merge(packed, other, accept)
        assert torch.equal(packed.x, before), "the tokens of before are someone's still"
        packed = merged
        assert packed.packing is not None and sum(packed.packing.lengths) == len(packed.x)
        found = packing.unpack(packed)
        for name in ("size", "alive", "source"):
            assert torch.equal(getattr(found, name), getattr(tokens, name)), (step, name)
        assert_close(found.x[found.alive], tokens.x[tokens.alive])
    assert tokens.ragged and tokens.counts().min() < 6


def test_the_class_row_is_the_matrixs_first() -> None:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.tensor([7, 1, 4])
    alive = torch.arange(7) < lengths[:, None]
    mask = alive[:, None, None]
    packing = Packing((7, 1, 4), alive.flatten().nonzero()[:, 0])
    q, k, v = (torch.randn(12, 2, 5, generator=generator) for _ in range(3))
    apart, keys = packing.unpack(q), packing.unpack(k)
    whole = attention.matrix(apart, keys, mask)[:, :, 0].mean(1)
    one_by_one = attention.one_by_one(q, k, v, packing.lengths, None, scores=True)[1]
    assert one_by_one is not None
    for packed in (one_by_one, attention.first_scores(q, k, packing)):
        row = attention.class_row(packing.unpack(packed), 5, mask)
        assert_close(row, whole)
        assert (row[~alive] == 0).all()
    assert_close(attention.class_row(attention.first_scores(apart, keys), 5, mask), whole)


@pytest.mark.parametrize("lengths", [(4, 4, 4), (7, 1, 4)])
@pytest.mark.parametrize("biased", [False, True])
def test_what_a_gpu_runs_is_what_a_cpu_runs(lengths: tuple[int, ...], biased: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    alive = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    packing = Packing(lengths, alive.flatten().nonzero()[:, 0])
    q, k, v = (torch.randn(12, 2, 5, generator=generator) for _ in range(3))
    bias = torch.rand(3, 1, 1, max(lengths), generator=generator) if biased else None
    ours, scores = attention.one_by_one(q, k, v, lengths, bias, scores=True)
    assert_close(attention.packed(q, k, v, packing, bias), ours)
    assert scores is not None
    assert_close(attention.first_scores(q, k, packing), scores)
    # A known answer: padded, with the dead keys masked.
    mask = alive[:, None, None] if bias is None else bias.masked_fill(~alive[:, None, None], -1e9)
    apart = attention.padded(*(packing.unpack(t) for t in (q, k, v)), mask)
    assert_close(ours, apart[alive])


def test_who_may_not_act_does_not_change_the_others() -> None:
    policy = agents.load("dora-deit_tiny")
    assert isinstance(policy, ActorPolicy)
    generator = torch.Generator().manual_seed(3)
    active = torch.rand(5, 11, generator=generator) < 0.5
    active[1] = False
    own = torch.randn(5, 11, policy.widths.own, generator=generator)
    shared = torch.randn(5, policy.widths.shared, generator=generator)
    seen = Observation(own, shared, active, 0, {})
    logits = policy.logits(own, shared)
    odds = torch.tensor(policy.threshold).logit()
    wanted = (logits[..., 1] - logits[..., 0] >= odds) & active
    assert 0 < wanted.sum() < active.sum()
    assert torch.equal(policy.act(seen), wanted.long())
