"""Merging and pruning between attention and MLP: what DORA's rules do to the tokens and logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import backbone as digits_backbone
from helpers import source
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_games import (
    BLOCKS,
    EXECUTION,
    KINDS,
    Decide,
    actor,
    gated,
    merge_rules,
    prune_rules,
    run,
    table,
)
from test_backbone import family_model, image_for
from test_reduction import check_invariants
from torch import Tensor
from torch.testing import assert_close

from agents.policies.heuristics import MergeAbove, MergeStrongest
from tokenenv.data import open_source
from tokenenv.errors import UserError
from tokenenv.game.episode import Episode
from tokenenv.game.policy import play
from tokenenv.game.rules import LayerMerge, LayerPrune, Observation
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.load import load_backbone
from tokenenv.vit.tokens import Tokens


@pytest.fixture(scope="module", params=KINDS)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return family_model(request.param)


@pytest.fixture(scope="module")
def deit() -> Backbone:
    return family_model("deit")


POLICIES: dict[str, Callable[[Backbone], Any]] = {
    "strongest": lambda b: MergeStrongest(merge_rules(b), 5),
    "above": lambda b: MergeAbove(merge_rules(b), 0.4),
    "actor": actor,
    "gated": gated,
}


# Nobody decides, nothing changes; the executions and the neighbours ------------------------------
@EXECUTION
@pytest.mark.parametrize("action", ["pairs", "tokens", "count"])
def test_keeping_everything_gives_timms_logits(
    backbone: Backbone, action: str, execution: str
) -> None:
    images = image_for(backbone, 3)
    rules = [prune_rules(backbone, action=action)] if action != "pairs" else []
    rules += [merge_rules(backbone, action=action)] if action != "tokens" else []
    if action == "count" and not backbone.has_class_token:
        with pytest.raises(UserError, match="'redundancy' needs a class token"):
            rules.pop(0).check(backbone)
    with torch.inference_mode():
        expected = backbone.model(images)
    assert expected.std() > 1e-3
    for one in rules:
        one.check(backbone)
        keep = 1 if action == "tokens" else 0
        episode = run(
            backbone, one, images, lambda s, k=keep: torch.full_like(s.active.long(), k), execution
        )
        assert_close(episode.logits, expected, atol=1e-5, rtol=0)
        assert (table(episode) == backbone.prefix + backbone.patches).all()


@pytest.mark.parametrize("name", POLICIES)
def test_masked_equals_padded_and_neighbours_are_not_felt(backbone: Backbone, name: str) -> None:
    policy = POLICIES[name](backbone)
    images = image_for(backbone, 6) * torch.linspace(0.2, 2, 6)[:, None, None, None]
    with torch.inference_mode():
        masked, padded = (play(backbone, policy, images, e) for e in ("masked", "padded"))
        dense = backbone(images)
    counts = table(masked)
    full = backbone.prefix + backbone.patches
    assert counts.min() < full
    if name != "strongest":
        assert len(counts.unique(dim=1).T) > 1, "the policy should treat images differently"
    assert torch.equal(counts, table(padded))
    assert torch.equal(masked.tokens.patch_alive(), padded.tokens.patch_alive())
    assert_close(masked.logits, padded.logits, atol=1e-4, rtol=0)
    assert (masked.logits - dense).abs().max() > 1e-3  # it is no small matter

    order = torch.tensor([3, 0, 5, 1, 4, 2])
    for execution, together in (("masked", masked), ("padded", padded)):
        with torch.inference_mode():
            shuffled = play(backbone, policy, images[order], execution)
        assert torch.equal(table(shuffled), counts[:, order])
        assert_close(shuffled.logits, together.logits[order], atol=1e-4, rtol=0)
        for i in range(3):
            with torch.inference_mode():
                alone = play(backbone, policy, images[i : i + 1], execution)
            assert torch.equal(table(alone)[:, 0], counts[:, i])
            assert_close(alone.logits, together.logits[i : i + 1], atol=1e-4, rtol=0)


# What happens to patches -------------------------------------------------------------------------
def coins(generator: torch.Generator, p: float) -> Decide:
    return lambda seen: (torch.rand(seen.active.shape, generator=generator) < p).long()


@EXECUTION
def test_merging_conserves_patches(backbone: Backbone, execution: str) -> None:
    images, generator = image_for(backbone, 4), torch.Generator().manual_seed(0)
    nobody = torch.zeros(4, backbone.patches, dtype=torch.bool)
    decide = coins(generator, 0.6)
    with torch.inference_mode():
        episode = Episode(backbone, merge_rules(backbone), images, execution=execution)
        while not episode.done:
            possible = episode.observe().active
            action = decide(episode.observe())
            wanted = (possible & action.bool()).sum(1)
            episode.act(action)
            assert torch.equal(episode.counts[-2] - episode.counts[-1], wanted)
            check_invariants(episode.tokens, nobody)
            sizes = episode.tokens.size[:, backbone.prefix :].sum(1)
            assert sizes.tolist() == [backbone.patches] * 4
    assert episode.counts[-1].max() < backbone.patches // 2
    assert episode.tokens.size.max() > 2


@EXECUTION
def test_exactly_the_pruned_patches_are_gone(backbone: Backbone, execution: str) -> None:
    images, generator = image_for(backbone, 4), torch.Generator().manual_seed(0)
    rules = prune_rules(backbone)
    pruned = torch.zeros(4, backbone.patches, dtype=torch.bool)
    with torch.inference_mode():
        episode = Episode(backbone, rules, images, execution=execution)
        while not episode.done:
            keep = torch.rand(4, backbone.patches, generator=generator) < 0.6
            keep[0] = episode.step != 1  # would lose all
            keep[1] = True
            episode.act(rules.from_roster(episode.tokens, keep.long()))
            for row in range(4):
                left = keep[row] & ~pruned[row]
                if left.sum() >= 4:
                    pruned[row] = ~left
            check_invariants(episode.tokens, pruned)
            assert torch.equal(episode.counts[-1], (~pruned).sum(1))
    left = episode.counts[-1].tolist()
    assert left[:2] == [backbone.patches] * 2 and 4 < left[2] < backbone.patches // 2


@settings(max_examples=25, deadline=None)
@given(
    action=st.sampled_from(["tokens", "count"]),
    step=st.integers(1, 60),
    selector=st.sampled_from(["redundancy", "cls_attention"]),
    execution=st.sampled_from(["masked", "padded"]),
    p=st.floats(0, 1),
    seed=st.integers(0, 2**31 - 1),
)
def test_four_tokens_stay_whatever_the_action(
    action: str, step: int, selector: str, execution: str, p: float, seed: int
) -> None:
    backbone, generator = digits_backbone(), torch.Generator().manual_seed(seed)
    rules = LayerPrune(tuple(range(backbone.depth)), action, budget_step=step, selector=selector)
    rules.check(backbone)
    choices = rules.actions(backbone)

    def decide(seen: Observation) -> Tensor:
        if action == "tokens":
            return coins(generator, p)(seen)
        return torch.randint(0, choices, seen.active.shape, generator=generator)

    images = source().batch(torch.arange(3)).images
    with torch.inference_mode():
        episode = Episode(backbone, rules, images, execution=execution)
        while not episode.done:
            seen, before = episode.observe(), episode.counts[-1]
            choice = decide(seen)
            episode.act(choice)
            taken = before - episode.counts[-1]
            assert (episode.counts[-1] >= 4).all() and (taken >= 0).all()
            if action == "count":
                # A feasible number is taken exactly, any other as far as it goes.
                assert torch.equal(taken, torch.minimum(choice[:, 0] * step, before - 4))
                legal = seen.legal[:, 0].gather(1, choice)[:, 0]
                assert torch.equal(legal, choice[:, 0] * step <= before - 4)
    assert episode.logits.isfinite().all()


def test_the_budget_grid_is_the_papers() -> None:
    """papers.md section 1.2: {2, 4, ..., N - 4}, 96 of them for 196 tokens, and none."""
    budgets = LayerPrune(action="count").budgets(196)
    assert budgets == (0, *range(2, 193, 2)) and len(budgets) - 1 == 96


# The forward pass, written out -------------------------------------------------------------------
class ByHand:
    """One image through the model with plain matrix products; who is gone is not there."""

    def __init__(self, backbone: Backbone, image: Tensor) -> None:
        self.model, self.prefix = backbone.model, backbone.prefix
        self.pools = not backbone.has_class_token
        self.x = backbone.embed(image[None]).x[0]
        self.size = torch.ones(len(self.x))

    def attend(self, index: int, *, by_size: bool) -> None:
        block = self.model.blocks[index]
        heads, width = block.attn.num_heads, block.attn.head_dim
        qkv = F.linear(block.norm1(self.x), block.attn.qkv.weight, block.attn.qkv.bias)
        q, k, v = qkv.reshape(len(self.x), 3, heads, width).unbind(1)
        out = torch.zeros_like(v)
        for head in range(heads):
            score = q[:, head] @ k[:, head].T / width**0.5
            if by_size:
                # A token that stands for s patches counts as s equal keys.
                weight = score.exp() * self.size
                out[:, head] = weight / weight.sum(1, keepdim=True) @ v[:, head]
            else:
                out[:, head] = score.softmax(1) @ v[:, head]
        self.keys = k.mean(1)
        self.x = self.x + block.ls1(block.attn.proj(out.flatten(1)))

    def feed(self, index: int) -> None:
        block = self.model.blocks[index]
        self.x = self.x + block.ls2(block.mlp(block.norm2(self.x)))

    def prune(self, keep: Tensor) -> None:
        rows = torch.cat([torch.ones(self.prefix).bool(), keep])
        self.x, self.size = self.x[rows], self.size[rows]

    def pairs(self) -> list[tuple[int, int, float]]:
        """Each of every second token with its most similar partner among the others."""
        found = []
        last = len(self.x)
        for a in range(self.prefix, last, 2):
            rivals = {
                b: F.cosine_similarity(self.keys[a], self.keys[b], dim=0).item()
                for b in range(self.prefix + 1, last, 2)
            }
            best = max(rivals, key=lambda b: rivals[b])
            found.append((a, best, rivals[best]))
        return found

    def merge(self, pairs: list[tuple[int, int]]) -> None:
        group = {b: [b] for _, b in pairs}
        for a, b in pairs:
            group[b].append(a)
        x, size = self.x.clone(), self.size.clone()
        for b, members in group.items():
            size[b] = sum(self.size[m] for m in members)
            x[b] = sum(self.size[m] * self.x[m] for m in members) / size[b]
        gone = {a for a, _ in pairs}
        left = [i for i in range(len(x)) if i not in gone]
        self.x, self.size = x[left], size[left]

    def logits(self) -> Tensor:
        x = self.model.norm(self.x)
        if self.pools:
            weight = self.size[self.prefix :, None]
            x = (x[self.prefix :] * weight).sum(0) / weight.sum()
        else:
            x = x[0]
        return self.model.head(self.model.fc_norm(x))


WRITTEN_OUT = pytest.mark.parametrize("kind", ["deit", "average pooling, no class token"])


@EXECUTION
@WRITTEN_OUT
@torch.no_grad()
def test_pruned_tokens_take_part_in_the_blocks_attention(kind: str, execution: str) -> None:
    backbone = family_model(kind)
    images = image_for(backbone, 3)
    keep = torch.rand(3, backbone.patches, generator=torch.Generator().manual_seed(0)) < 0.5
    rules = LayerPrune((2,), "tokens")
    episode = run(backbone, rules, images, lambda seen: keep.long(), execution)
    for i, image in enumerate(images):
        hand = ByHand(backbone, image)
        for block in range(backbone.depth):
            hand.attend(block, by_size=False)
            if block == 2:
                hand.prune(keep[i])
            hand.feed(block)
        assert_close(episode.logits[i], hand.logits(), atol=1e-5, rtol=0)
    early = run(backbone, LayerPrune((1,), "tokens"), images, lambda seen: keep.long(), execution)
    assert (early.logits - episode.logits).abs().max() > 1e-3
    full, left = backbone.prefix + backbone.patches, backbone.prefix + keep.sum(1)
    assert [n.tolist() for n in episode.attended] == [[full] * 3] * 3 + [left.tolist()]
    assert [n.tolist() for n in episode.fed] == [[full] * 3] * 2 + [left.tolist()] * 2


@EXECUTION
@pytest.mark.parametrize("proportional", [True, False])
@WRITTEN_OUT
@torch.no_grad()
def test_merging_is_toms_written_out(kind: str, proportional: bool, execution: str) -> None:
    """Size-weighted means, sizes as so many keys, the best partner of every second token."""
    backbone = family_model(kind)
    images, wished = image_for(backbone, 3), {0: 0.3, 1: 0.7, 3: 0.5}
    rules = LayerMerge(BLOCKS, features=("similarity", "size"), proportional=proportional)
    width = -(-backbone.patches // 2)
    votes = [
        torch.rand(3, width, generator=torch.Generator().manual_seed(b)) < p
        for b, p in wished.items()
    ]
    episode = run(
        backbone, rules, images, lambda s: votes[s.step][:, : s.active.shape[1]].long(), execution
    )
    for i, image in enumerate(images):
        hand = ByHand(backbone, image)
        for block in range(backbone.depth):
            hand.attend(block, by_size=proportional)
            if block in BLOCKS:
                vote = votes[BLOCKS.index(block)][i]
                pairs = hand.pairs()
                hand.merge([(a, b) for (a, b, _), yes in zip(pairs, vote, strict=False) if yes])
            hand.feed(block)
        assert len(hand.x) == episode.fed[-1][i]
        assert hand.size.max() >= 4  # the sizes mattered
        assert_close(episode.logits[i], hand.logits(), atol=1e-5, rtol=0)


@torch.no_grad()
def test_sizes_of_one_weigh_as_no_sizes(backbone: Backbone) -> None:
    """The bias is there, and zero; with another size it is not."""
    tokens = replace(backbone.embed(image_for(backbone)), merged=True, ragged=True)
    assert tokens.size_bias is not None and (tokens.size_bias == 0).all()
    options = {"keys": True, "cls_attention": backbone.has_class_token}
    plain, plain_context = backbone.attend(1, tokens, **options)
    sized, context = backbone.attend(1, tokens, proportional=True, **options)
    assert_close(sized.x, plain.x, atol=1e-6, rtol=0)
    assert_close(context.cls_attention, plain_context.cls_attention, atol=1e-7, rtol=0)
    doubled = replace(tokens, size=tokens.size.clone().index_fill(1, torch.tensor(5), 2.0))
    other, _ = backbone.attend(1, doubled, proportional=True)
    assert (other.x - plain.x).abs().max() > 1e-4


@torch.no_grad()
def test_a_token_of_three_patches_attends_as_three_equal_tokens(deit: Backbone) -> None:
    tokens = deit.embed(image_for(deit, 2))
    one = replace(tokens, size=tokens.size.clone().index_fill(1, torch.tensor(7), 3.0), merged=True)
    triple = Tokens.start(torch.cat([tokens.x, tokens.x[:, 7:8], tokens.x[:, 7:8]], 1), deit.prefix)
    sized, context = deit.attend(0, one, proportional=True, cls_attention=True)
    copied, other = deit.attend(0, triple, cls_attention=True)
    assert_close(sized.x, copied.x[:, :-2], atol=1e-5, rtol=0)
    assert_close(context.cls_attention[:, 7], other.cls_attention[:, [7, -1, -2]].sum(1))


# What is seen, by hand ---------------------------------------------------------------------------
@torch.no_grad()
def test_redundancy_and_similarity_by_hand(deit: Backbone) -> None:
    images = image_for(deit, 2)
    hand = ByHand(deit, images[0])
    hand.attend(0, by_size=False)
    seen = Episode(deit, merge_rules(deit), images, execution="padded").observe()
    expected = torch.tensor([cosine for _, _, cosine in hand.pairs()])
    scaled = torch.stack([(expected - 0.9) / 0.05, (expected - expected.mean()) / 0.05], 1)
    assert_close(seen.feature("similarity")[0], scaled, atol=1e-4, rtol=0)

    seen = Episode(deit, prune_rules(deit), images, execution="padded").observe()
    attention = seen.feature("cls_attention")[0, :, 0]
    for j, value in enumerate(seen.feature("redundancy")[0, :, 0].tolist()):
        rivals = [
            F.cosine_similarity(hand.keys[1 + j], hand.keys[1 + i], dim=0).item()
            for i in range(deit.patches)
            if attention[i] > attention[j]
        ]
        assert value == pytest.approx(max(rivals, default=-1.0), abs=1e-5)


@torch.no_grad()
def test_what_is_seen_of_a_pair_by_hand(deit: Backbone) -> None:
    rules = merge_rules(deit)
    episode = Episode(deit, rules, image_for(deit, 2), execution="masked")
    episode.act(torch.ones(2, 25, dtype=torch.long))
    seen, match, tokens = episode.observe(), episode.moment.match, episode.tokens
    attention = episode.moment.context.cls_attention
    assert tokens.size.max() > 2 and 0 < seen.active.sum() < seen.active.numel()
    assert (seen.agents[~seen.active] == 0).all()
    for row, place in seen.active.nonzero().tolist():
        pair = [int(match.token[row, place]), int(match.partner[row, place])]
        one, other = tokens.x[row, pair]
        keys = episode.moment.context.mean_keys[row, pair]
        mean = attention[row, 1:].sum() / tokens.visual_alive[row].sum()
        cosine = torch.dot(one, other) / (one.norm() * other.norm())
        expected = {
            "size": tokens.size[row, pair].log(),
            "token": torch.stack([(cosine - 0.9) / 0.05, (one.norm() / other.norm()).log()]),
            "keys": keys.flatten(),
            "cls_attention": (attention[row, pair] / mean).log().clamp(min=-4),
        }
        for name, values in expected.items():
            assert_close(seen.feature(name)[row, place], values, atol=1e-4, rtol=1e-4)


# Real weights and photographs --------------------------------------------------------------------
def test_the_invariants_hold_on_deit_tiny(real_data: Path) -> None:
    weights = real_data / "weights/deit_tiny_patch16_224.safetensors"
    backbone = load_backbone("deit_tiny_patch16_224", str(weights))
    photographs = open_source(str(real_data / "imagenet_val_300"), backbone.model, limit=8)
    images = photographs.batch(torch.arange(8)).images
    with torch.inference_mode():
        dense = backbone.model(images)
    blocks = tuple(range(12))
    for rules, keep in ((LayerMerge(blocks), 0), (LayerPrune(blocks, "tokens"), 1)):
        calm = run(backbone, rules, images, lambda s, k=keep: s.active.long() * 0 + k, "padded")
        assert_close(calm.logits, dense, atol=1e-5, rtol=0)

    tome = MergeStrongest(LayerMerge(blocks), 8)
    with torch.inference_mode():
        masked, padded = (play(backbone, tome, images, e) for e in ("masked", "padded"))
        alone = play(backbone, tome, images[3:4], "padded")
    assert torch.stack(masked.counts)[:, 0].tolist() == [196 - 8 * i for i in range(13)]
    assert torch.equal(table(masked), table(padded))
    assert_close(masked.logits, padded.logits, atol=1e-4, rtol=0)
    assert_close(alone.logits, masked.logits[3:4], atol=1e-4, rtol=0)
    check_invariants(masked.tokens, torch.zeros(8, 196, dtype=torch.bool))
    assert (masked.logits.argmax(1) == dense.argmax(1)).float().mean() >= 0.75
