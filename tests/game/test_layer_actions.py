"""What per-block agents say and are told: counts, the past, heuristics, what can't be asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from helpers import backbone as digits_backbone
from helpers import source
from layer_games import BLOCKS, EXECUTION, KINDS, merge_rules, prune_rules, run, table
from test_backbone import family_model, image_for
from torch import Tensor
from torch.testing import assert_close

from agents.policies.heuristics import MergeAbove, MergeRandom, MergeStrongest
from tokenenv.errors import UserError
from tokenenv.game.episode import Episode
from tokenenv.game.rules import LayerMerge, LayerPrune, Moment, Observation
from tokenenv.game.rules.layer import history
from tokenenv.vit.backbone import Backbone, Context
from tokenenv.vit.tokens import Tokens


@pytest.fixture(scope="module", params=KINDS)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return family_model(request.param)


@pytest.fixture(scope="module")
def deit() -> Backbone:
    return family_model("deit")


# Two kinds of action, one decision ---------------------------------------------------------------
@EXECUTION
def test_a_count_merges_the_most_similar_pairs(backbone: Backbone, execution: str) -> None:
    images, grid = image_for(backbone, 4), merge_rules(backbone).grid
    choice = torch.tensor([[0, 2, 4], [4, 4, 4], [1, 0, 3], [3, 3, 1]]).T[..., None]
    count = run(
        backbone,
        merge_rules(backbone, action="count"),
        images,
        lambda seen: choice[seen.step],
        execution,
    )

    def same_by_hand(seen: Observation) -> Tensor:
        """The first of an image's ``grid[choice]`` highest similarities."""
        similarity, action = seen.feature("similarity")[..., 0], torch.zeros_like(seen.active)
        for row, (values, active) in enumerate(zip(similarity, seen.active, strict=True)):
            known = [j for j in range(len(values)) if active[j]]
            known.sort(key=lambda j: -values[j].item())
            action[row, known[: grid[choice[seen.step, row, 0]]]] = True
        return action.long()

    pairs = run(backbone, merge_rules(backbone), images, same_by_hand, execution)
    assert torch.equal(table(count), table(pairs))
    assert torch.equal(count.tokens.source, pairs.tokens.source)
    assert_close(count.logits, pairs.logits, atol=1e-6, rtol=0)
    removed = torch.stack(count.counts).diff(dim=0).neg()
    assert removed.tolist() == torch.tensor(grid)[choice[..., 0]].tolist()


@EXECUTION
def test_a_count_goes_on_with_one_token_left_and_no_pair(execution: str) -> None:
    rules = LayerMerge(tuple(range(6)), "count", grid=(0, 1, 2, 4, 8, 16, 32), shuffle=True)
    images = source().batch(torch.arange(2)).images
    episode = Episode(digits_backbone(), rules, images, execution=execution)
    while not episode.done:
        most = episode.observe().legal.long().cumsum(2).argmax(2)
        episode.act(most)
    assert episode.counts[-1].tolist() == [1, 1]


@EXECUTION
@pytest.mark.parametrize("selector", ["redundancy", "cls_attention"])
def test_a_count_prunes_by_the_selector(deit: Backbone, selector: str, execution: str) -> None:
    images = image_for(deit, 4)
    choice = torch.tensor([[0, 5, 2], [1, 1, 1], [3, 0, 6], [7, 2, 0]]).T[..., None]
    by_count = LayerPrune(BLOCKS, "count", budget_step=2, selector=selector)
    count = run(deit, by_count, images, lambda seen: choice[seen.step], execution)

    def same_by_hand(seen: Observation) -> Tensor:
        score, action = seen.feature(selector)[..., 0], torch.ones_like(seen.active)
        sign = -1 if selector == "redundancy" else 1  # the most redundant, the least attended
        for row, (values, active) in enumerate(zip(score, seen.active, strict=True)):
            known = [j for j in range(len(values)) if active[j]]
            known.sort(key=lambda j: sign * values[j].item())
            action[row, known[: 2 * int(choice[seen.step, row, 0])]] = False
        return action.long()

    tokens = run(deit, prune_rules(deit), images, same_by_hand, execution)
    assert torch.equal(table(count), table(tokens))
    assert torch.equal(count.tokens.patch_alive(), tokens.tokens.patch_alive())
    assert_close(count.logits, tokens.logits, atol=1e-6, rtol=0)


# What agents are told of the past ----------------------------------------------------------------
def test_the_history_by_hand() -> None:
    counts = tuple(torch.tensor(n) for n in ([40, 40], [30, 40], [30, 20]))
    tokens = Tokens.start(torch.zeros(2, 41, 4), 1)

    def told(step: int) -> Tensor:
        return history(Moment(tokens, step, Context(), counts[: step + 1]))

    assert told(0).tolist() == [[1.0, 0.0, 0.0]] * 2
    assert_close(told(1), torch.tensor([[0.75, 0.25, 1 / 2], [1.0, 0.0, 0.0]]))
    assert_close(told(2), torch.tensor([[0.75, 0.0, 1 / 3], [0.5, 0.5, 1 / 3]]))


# Heuristics --------------------------------------------------------------------------------------
def candidates(score: Tensor, active: Tensor) -> Observation:
    own = torch.stack([(score - 0.9) / 0.05, torch.zeros_like(score)], 2) * active[..., None]
    return Observation(own, score[:, :0], active, 0, {"similarity": slice(0, 2)})


def test_merging_heuristics_against_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    score = 2 * torch.rand(60, 12, generator=generator) - 1
    active = torch.rand(60, 12, generator=generator) < 0.6
    seen = candidates(score, active)
    strongest = MergeStrongest(LayerMerge(), 4).act(seen)
    above = MergeAbove(LayerMerge(), 0.25).act(seen)
    random = MergeRandom(LayerMerge(), 4, seed=1)
    first, second = random.act(seen), random.act(seen)
    again = MergeRandom(LayerMerge(), 4, seed=1).act(seen)
    assert torch.equal(first, again) and not torch.equal(first, second)
    for s, a, best, high, some in zip(score, active, strongest, above, first, strict=True):
        living = s[a].tolist()
        # Those that can't merge may say what they like.
        assert sorted(s[a & best.bool()].tolist()) == sorted(living)[-4:]
        assert sorted(s[a & high.bool()].tolist()) == sorted(v for v in living if v >= 0.25)
        assert (a & some.bool()).sum() == min(4, len(living))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: MergeStrongest(LayerMerge(), -1), "r=-1 pairs to merge: give 0 or more"),
        (lambda: MergeRandom(LayerMerge(), -1), "r=-1"),
        (lambda: MergeAbove(LayerMerge(), 1.5), "similarity 1.5 is no cosine"),
        (lambda: MergeAbove(LayerMerge(), float("nan")), "similarity nan is no cosine"),
        (lambda: LayerMerge(grid=(0,)), "must increase from 0"),
        (lambda: LayerMerge(grid=(1, 2)), "must increase from 0"),
        (lambda: LayerMerge(grid=(0, 4, 4)), "must increase from 0"),
        (lambda: LayerMerge(action="tokens"), "action='tokens': choose from pairs, count"),
        (lambda: LayerMerge(features=("smell",)), "unknown feature 'smell'"),
        (lambda: LayerPrune(action="pairs"), "action='pairs': choose from tokens, count"),
        (lambda: LayerPrune(selector="luck"), "selector='luck'"),
        (lambda: LayerPrune(budget_step=0), "budget_step=0 must be at least 1"),
        (lambda: LayerPrune((3, 3)), "strictly increasing"),
    ],
)
def test_bad_parameters(build: Callable[[], Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_rules_that_do_not_fit_the_model(deit: Backbone) -> None:
    no_class = family_model("average pooling, no class token")
    tiny = Backbone(
        timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=16, num_heads=2)
    )
    one = Backbone(
        timm.create_model("vit_tiny_patch16_224", img_size=16, depth=1, embed_dim=16, num_heads=2)
    )
    for rules, backbone, words in (
        (LayerMerge(), deit, "decision block 11 is out of range: the model has blocks 0 to 3"),
        (LayerMerge((0,), "count", grid=(0, 25)), deit, "asks for 25 pairs and 49 visual"),
        (LayerMerge((0,)), no_class, "'cls_attention' needs a class token"),
        (LayerMerge((0,)), one, "the model has 1 visual tokens: no two could merge"),
        (LayerPrune(), deit, "decision block 11 is out of range"),
        (LayerPrune((0,), budget_step=46), deit, "budget_step=46 doesn't fit 49 visual tokens"),
        (LayerPrune((0,), features=("redundancy",)), no_class, "'redundancy' needs a class token"),
        (LayerPrune((0,)), tiny, "the model has 4 visual tokens and 4 always stay"),
    ):
        with pytest.raises(UserError, match=words):
            rules.check(backbone)
