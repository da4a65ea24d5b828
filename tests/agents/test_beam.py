"""Planning by beam search: exact copies of episodes, and what a wider beam guarantees."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from helpers import small
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import agents
from agents.policies.beam import Beam, BeamMerge, nested
from agents.policies.words import parse_policy
from tokenenv import UserError, build_game, load_backbone, open_source
from tokenenv.game.cost import Cost
from tokenenv.game.episode import EXECUTIONS, Episode
from tokenenv.game.policy import play
from tokenenv.game.rewards.base import divergence
from tokenenv.game.rules import LayerMerge
from tokenenv.measure import evaluation
from tokenenv.measure.episodes import macs_so_far
from tokenenv.vit.backbone import Backbone

WORDS = ("beam-merge:price=0.03,blocks=1/3/5/7", "beam-prune:price=0.1,blocks=2/5/8,tries=4")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone()


@pytest.fixture(scope="module")
def images(backbone: Backbone) -> torch.Tensor:
    source = open_source(None, backbone.model, split="train", limit=12)
    return source.batch(torch.arange(12)).images


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("rules", ["token_prune", "layer_merge", "layer_prune"])
def test_selected_images_go_on_as_the_originals(rules: str, execution: str) -> None:
    game = build_game(**small(rules=rules, execution=execution, batch_size=5, max_cycles=3))
    game.reset()
    generator = torch.Generator().manual_seed(0)
    rows = torch.tensor([3, 3, 0, 4])
    episode = game.episode
    for _ in range(2):
        twin = episode.select(rows)
        seen = episode.observe(state=True)
        assert_close(twin.observe(state=True).agents, seen.agents[rows], atol=1e-4, rtol=0)
        assert_close(twin.observe(state=True).state, seen.state[rows], atol=1e-4, rtol=0)
        shape = (5, seen.active.shape[1])
        action = torch.randint(2, shape, generator=generator)
        twin.act(action[rows])
        episode.act(action)
        assert all(map(torch.equal, twin.counts, [count[rows] for count in episode.counts]))
        assert all(map(torch.equal, twin.fed, [count[rows] for count in episode.fed]))
        finished = twin.finish(torch.arange(4))
        assert_close(finished, episode.finish(rows), atol=1e-4, rtol=0)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 999), tries=st.integers(2, 4), depth=st.integers(1, 4),
    width=st.integers(1, 6),
)  # fmt: skip
def test_a_wider_beam_follows_what_a_narrower_one_follows(
    seed: int, tries: int, depth: int, width: int
) -> None:
    """On random trees: each plan's score depends on the plan alone."""
    generator = torch.Generator().manual_seed(seed)
    tree = {
        plan: torch.rand((), generator=generator).item()
        for length in range(1, depth + 1)
        for plan in itertools.product(range(tries), repeat=length)
    }

    def followed(wide: int) -> list[tuple[int, ...]]:
        plans: list[tuple[int, ...]] = [()]
        for _ in range(depth):
            children = [(*plan, choice) for plan in plans for choice in range(tries)]
            scores = torch.tensor([[tree[child] for child in children]])
            plans = [children[i] for i in nested(scores, tries, wide)[0].tolist()]
        return plans

    greedy: tuple[int, ...] = ()
    for _ in range(depth):
        greedy = min(((*greedy, choice) for choice in range(tries)), key=tree.__getitem__)
    narrow, wide = followed(width), followed(width + 1)
    assert narrow[0] == greedy
    assert wide[: len(narrow)] == narrow and len(set(wide)) == len(wide)


def greedy(backbone: Backbone, policy: Beam, image: torch.Tensor) -> tuple[list[float], float]:
    """The greedy search in plain words, one image and one decision at a time."""
    cost, every = Cost(backbone), torch.zeros(1, dtype=torch.long)
    dense, taken, least = backbone(image), [], 0.0
    shares = torch.linspace(0, 1, policy.tries).tolist()

    def after(plan: list[float]) -> Episode:
        episode = Episode(backbone, policy.reduction, image, execution="masked")
        for share in plan:
            episode.act(policy.removing(episode, torch.tensor([[share]])))
        return episode

    for _ in policy.rules.blocks:
        scores = []
        for share in shares:
            episode = after([*taken, share])
            macs = macs_so_far(episode, policy, cost) / cost.dense()
            damage = divergence(dense, episode.finish(every), tau=1.0)
            scores.append(float(damage + policy.price * macs))
        least = min(scores)
        taken.append(shares[scores.index(least)])
    return taken, least


@pytest.mark.parametrize("word", WORDS)
@torch.inference_mode()
def test_a_beam_of_one_is_greedy(backbone: Backbone, images: torch.Tensor, word: str) -> None:
    policy = parse_policy(f"{word},width=1", backbone.depth)
    assert isinstance(policy, Beam)
    episode = Episode(backbone, policy.reduction, images[:4], execution="packed")
    plans, scores = policy.search(episode)
    for image, plan, score in zip(images[:4].split(1), plans, scores, strict=True):
        taken, least = greedy(backbone, policy, image)
        assert_close(plan.tolist(), taken)
        assert_close(score.item(), least, atol=1e-4, rtol=0)


@pytest.mark.parametrize("word", WORDS)
@torch.inference_mode()
def test_a_wider_beam_is_never_worse(backbone: Backbone, images: torch.Tensor, word: str) -> None:
    found = []
    for width in (1, 3, 6):
        policy = parse_policy(f"{word},width={width}", backbone.depth)
        assert isinstance(policy, Beam)
        played = play(backbone, policy, images)  # what is played has the score that was planned
        cost = Cost(backbone)
        score = divergence(backbone(images), played.logits, tau=1.0)
        score = score + policy.price * cost.of(played, policy) / cost.dense()
        episode = Episode(backbone, policy.reduction, images, execution="packed")
        assert_close(policy.search(episode)[1].double(), score.double(), atol=1e-4, rtol=0)
        found.append(score)
    assert (found[1] <= found[0] + 1e-4).all() and (found[2] <= found[1] + 1e-4).all()
    assert found[2].mean() < 0.985 * found[0].mean()


@torch.inference_mode()
def test_each_image_is_planned_alone(backbone: Backbone, images: torch.Tensor) -> None:
    policy = parse_policy(WORDS[0], backbone.depth)
    assert isinstance(policy, Beam)
    together = policy.plan(Episode(backbone, policy.reduction, images, execution="packed"))
    alone = policy.plan(Episode(backbone, policy.reduction, images[5:6], execution="packed"))
    assert torch.equal(together[5:6], alone) and len(together.unique(dim=0)) > 1


def test_it_is_evaluated_saved_and_refused_as_other_policies(
    backbone: Backbone, tmp_path: Path
) -> None:
    source = open_source(None, backbone.model, split="train", limit=40)
    policy = parse_policy("beam-merge:price=0.5,width=2,tries=3,blocks=2/5/8", backbone.depth)
    found = evaluation.evaluate(backbone, policy, source)
    assert found.macs.mean() < found.dense_macs
    assert (found.reduced == found.dense).float().mean() > 0.9
    policy.save(tmp_path / "policy.safetensors")
    back = agents.load(tmp_path)
    assert isinstance(back, BeamMerge) and (back.width, back.tries, back.price) == (2, 3, 0.5)
    game = build_game(model=backbone, rules=back.rules, data=source)
    with pytest.raises(UserError, match="plans on an episode, not on an observation"):
        back.act(game.reset())
    for wrong in ({"width": 0}, {"tries": 1}, {"price": -1.0}, {"price": float("nan")}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            BeamMerge(**{"price": 1.0, **wrong}, rules=LayerMerge((1,)))
    with pytest.raises(UserError, match="needs price="):
        parse_policy("beam-merge:width=2", backbone.depth)
