"""Every image at its own length: the same decisions and logits as nothing moved, for all rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
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
from tokenenv.vit import packing, reduction
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.layout import arrange
from tokenenv.vit.tokens import Tokens

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
    episode = Episode(backbone, rules, images, execution=execution)  # type: ignore[arg-type]
    while not episode.done:
        episode.act(act(episode.observe(state=True)))
    return episode


def partition(tokens: Tokens) -> Tensor:
    """``(B, P, P)`` which patches share a token; a pruned one shares none."""
    same = tokens.owners[:, :, None] == tokens.owners[:, None]
    return same & (tokens.owners >= 0)[:, :, None]


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
            episode = Episode(backbone, rules, image_for(backbone, 5), execution=execution)
            episode.act(drawn(0)(episode.observe()))
            found.append(episode.finish(torch.tensor([0, 2, 4])))
    for logits in found[1:]:
        assert_close(logits, found[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_and_unpacking_is_compacting(dtype: torch.dtype) -> None:
    x = torch.randn(40, 49, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    keep = torch.rand(40, 48, generator=torch.Generator().manual_seed(1)) < torch.rand(40, 1)
    keep[0], keep[1] = False, True
    tokens = reduction.prune(Tokens.start(x, prefix=1), keep)
    packed, compact = packing.pack(tokens), packing.compact(tokens)
    layout = packed.packing
    assert layout is not None and layout.lengths == tuple(tokens.counts().tolist())
    assert len(packed.x) == layout.rows and 1 < len(layout.groups) < 40
    unpacked = packing.unpack(packed)
    count = compact.x.shape[1]
    for name in ("size", "alive"):
        assert torch.equal(getattr(unpacked, name)[:, :count], getattr(compact, name)), name
    assert torch.equal(unpacked.owners, compact.owners)
    assert not unpacked.alive[:, count:].any()
    assert torch.equal(unpacked.x[unpacked.alive], compact.x[compact.alive])
    assert packed.x.isfinite().all()
    # Equally long images lie as they would without packing.
    even = reduction.prune(Tokens.start(x, prefix=1), torch.arange(48).expand(40, 48) < 15)
    assert packing.unpack(packing.pack(even, left=16)).x.shape == (40, 16, 4)
    assert torch.equal(packing.unpack(packing.pack(even, left=16)).x, packing.compact(even).x)


@given(st.lists(st.integers(1, 260), min_size=1, max_size=70), st.booleans())
def test_every_layout_holds_each_token_once(lengths: list[int], recurs: bool) -> None:
    most = max(lengths) + 3 if recurs else None
    made = arrange(lengths, torch.device("cpu"), most)
    assert most is None or made.longest <= most
    row = made.row
    if row is None:
        row = made.first[:, None] + torch.arange(made.longest)
    rows = row[made.alive]
    assert len(rows.unique()) == len(rows) == sum(lengths)
    assert int(rows.max()) < made.rows and torch.equal(made.alive.sum(1), torch.tensor(lengths))
    assert row.min() >= 0 and row.max() < made.rows
    assert made.even == bool(made.alive.all())
    place = torch.arange(made.rows) if made.place is None else made.place
    assert torch.equal(place[rows], made.alive.flatten().nonzero()[:, 0])
    # Groups, and the portions cut from them, hold every image once, in its rows.
    for parts in (made.groups, [group for each in made.portions for group in each.groups]):
        held = [torch.arange(g.images) if g.members is None else g.members for g in parts]
        assert torch.cat(held).sort().values.tolist() == list(range(len(lengths)))
    end = 0
    for portion in made.portions:
        assert portion.start == end and portion.rows >= portion.stop - portion.start
        assert portion.start + portion.rows <= made.rows
        end = portion.stop
    assert end == made.rows
    groups, images = len(made.groups), len(lengths)
    if recurs:
        assert made.rows <= 1.15 * (sum(lengths) + 7 * images + 24 * groups) + 64
    else:
        assert made.rows <= sum(lengths) + 24 * groups


def test_few_sizes_recur() -> None:
    """Whatever the lengths, half precision computes few sizes of rows and of attention."""
    generator = torch.Generator().manual_seed(0)
    rows, lengths = set(), set()
    for _ in range(300):
        drawn = torch.randint(20, 198, (64,), generator=generator).tolist()
        made = arrange(drawn, torch.device("cpu"), 197)
        rows |= {portion.rows for portion in made.portions}
        lengths |= {group.length for group in made.groups}
    assert len(rows) < 70 and len(lengths) <= 25


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
        assert packed.packing is not None
        assert packed.packing.lengths == tuple(tokens.counts().tolist())
        found = packing.unpack(packed)
        assert torch.equal(found.owners, tokens.owners), step
        for name in ("size", "x"):
            same = getattr(found, name)[found.alive], getattr(tokens, name)[tokens.alive]
            assert_close(*same)
    assert tokens.ragged and tokens.counts().min() < 6


@pytest.mark.parametrize("recurs", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_attention_in_groups_is_attention_under_a_mask(biased: bool, recurs: bool) -> None:
    backbone = family_model("deit")
    generator = torch.Generator().manual_seed(2)
    layout = arrange([7, 1, 4, 40, 39, 40], torch.device("cpu"), 44 if recurs else None)
    x = torch.randn(6, layout.longest, backbone.dim, generator=generator)
    assert layout.row is not None
    rows = torch.zeros(layout.rows, backbone.dim).index_copy(
        0, layout.row[layout.alive], x[layout.alive]
    )
    shape = layout.alive.shape
    size = torch.randint(1, 5, shape, generator=generator) * layout.alive
    padded = replace(
        Tokens.start(x, 1), alive=layout.alive, size=size.float(), ragged=True, merged=biased
    )
    wants = {"cls_attention": True, "keys": True, "mean_keys": True, "matrix": True}
    with torch.inference_mode():
        for block in range(2):
            there, seen = backbone.attend(block, padded, proportional=biased, **wants)
            packed = replace(padded, x=rows, packing=layout)
            here, known = backbone.attend(block, packed, proportional=biased, **wants)
            assert_close(packing.unpack(here).x[layout.alive], there.x[layout.alive])
            for name in ("cls_attention", "mean_keys"):
                assert_close(getattr(known, name)[layout.alive], getattr(seen, name)[layout.alive])
            padded, rows = there, here.x
        ends = backbone.finish(padded, proportional=biased)
        assert_close(backbone.finish(here, proportional=biased), ends)
        last, _ = backbone.attend(backbone.depth - 1, padded, proportional=biased)
        assert_close(backbone.classify(backbone.feed(backbone.depth - 1, last)), ends)


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
    for some in (
        seen,
        replace(
            seen,
            agents=own.repeat(40, 1, 1),
            shared=shared.repeat(40, 1),
            active=active.repeat(40, 1),
        ),
    ):
        found = policy.act(some).bool() & some.active
        assert torch.equal(found[:5], wanted) and found.sum() == len(found) // 5 * wanted.sum()
