"""Policies that decide by systematic sampling: as many as the probabilities say, evenly spread."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import agents
import tokenenv
from agents.policies.actor import ActorPolicy, Widths, systematic
from agents.systems.rl4evit import RL4EViTConfig
from tokenenv import UserError, build_game, load_backbone, open_source
from tokenenv.game.policy import play
from tokenenv.game.rules import Observation, TokenPrune
from tokenenv.measure import evaluation
from tokenenv.vit.backbone import Backbone

FEATURES = ("progress", "cls_attention", "norm")
chances = st.lists(st.tuples(st.integers(0, 1024), st.booleans()), min_size=1, max_size=70)


def rows(members: list[tuple[int, bool]]) -> tuple[torch.Tensor, torch.Tensor]:
    chance, active = zip(*members, strict=True)
    return torch.tensor(chance)[None] / 1024, torch.tensor(active)[None]


@given(chances)
def test_as_many_of_any_stretch_as_its_chances_sum_to(members: list[tuple[int, bool]]) -> None:
    chance, active = rows(members)
    chosen = systematic(chance, active)
    assert not chosen[~active].any()
    assert not chosen[chance == 0].any() and chosen[active & (chance == 1)].all()
    wanted, got = (chance * active)[0].cumsum(0).tolist(), chosen[0].cumsum(0).tolist()
    assert got == [math.floor(sum_ + 0.5) for sum_ in wanted]


@given(chances)
def test_those_that_may_not_act_change_nothing(members: list[tuple[int, bool]]) -> None:
    chance, active = rows(members)
    living = systematic(chance[active][None], active[active][None])
    assert torch.equal(systematic(chance, active)[active], living[0])


def test_of_equal_tokens_every_second_one_stays() -> None:
    everyone = torch.ones(1, 8, dtype=torch.bool)
    assert systematic(torch.full((1, 8), 0.5), everyone).int().tolist() == [[1, 0] * 4]
    assert systematic(torch.full((1, 8), 0.25), everyone).int().tolist() == [[0, 1, 0, 0] * 2]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone()


def even_policy(backbone: Backbone) -> ActorPolicy:
    torch.manual_seed(0)
    rules = TokenPrune(features=FEATURES, share=False)
    game = build_game(model=backbone, features=FEATURES, share=False, batch_size=1)
    widths = Widths(game.agent_dim, game.shared_dim, game.state_dim)
    policy = ActorPolicy(rules, widths, hidden=(8,), initial=0.6, decide="systematic")
    policy.lean_on(rules.layout(backbone)["cls_attention"], 1.0)
    return policy.eval()


def test_the_threshold_moves_the_number(backbone: Backbone) -> None:
    policy, source = even_policy(backbone), open_source(None, backbone.model, limit=64)
    tokens = []
    for threshold in (0.3, 0.5, 0.7):
        policy.threshold = threshold
        found = evaluation.evaluate(backbone, policy, source)
        tokens.append(found.report()["tokens"][-1])
    assert 64 > tokens[0] > tokens[1] > tokens[2] > 0


def test_every_execution_and_batch_decides_alike(backbone: Backbone) -> None:
    policy = even_policy(backbone)
    images = open_source(None, backbone.model, limit=32).batch(torch.arange(32)).images
    with torch.inference_mode():
        played = {
            execution: play(backbone, policy, images, execution=execution)
            for execution in ("masked", "padded", "packed")
        }
        alone = play(backbone, policy, images[5:6])
    for episode in played.values():
        assert torch.equal(episode.counts[-1], played["masked"].counts[-1])
        assert_close(episode.logits, played["masked"].logits, atol=1e-4, rtol=0)
        assert_close(episode.logits[5:6], alone.logits, atol=1e-4, rtol=0)
    assert len(played["masked"].counts[-1].unique()) > 1


def test_the_disk_and_torch_export_keep_it(backbone: Backbone, tmp_path: Path) -> None:
    policy = even_policy(backbone)
    policy.save(tmp_path / "policy.safetensors")
    back = agents.load(tmp_path)
    assert isinstance(back, ActorPolicy) and back.decide == "systematic"
    images = open_source(None, backbone.model, limit=4).batch(torch.arange(4)).images
    fast = tokenenv.compress(backbone.model, back).eval()
    with torch.no_grad():
        whole = fast(images)
        one = torch.export.export(fast, (images[:1],), strict=False).module()
        for i in range(4):
            assert_close(one(images[i : i + 1]), whole[i : i + 1], atol=1e-4, rtol=0)


def test_with_probabilities_near_0_and_1_both_ways_agree(backbone: Backbone) -> None:
    policy = even_policy(backbone)
    layout = policy.rules.layout(backbone)
    policy.lean_on(layout["cls_attention"], 1e6)
    seen = torch.randn(3, 20, max(part.stop for part in layout.values()))
    observation = Observation(seen, seen[:, 0, :0], torch.ones(3, 20).bool(), 0, layout)
    by_sum = policy.act(observation)
    policy.decide = "threshold"
    assert torch.equal(by_sum, policy.act(observation)) and 0 < by_sum.sum() < by_sum.numel()


def test_who_decides_so() -> None:
    assert RL4EViTConfig.for_digits().decide == "systematic"
    assert RL4EViTConfig().decide == "threshold"
    with pytest.raises(UserError, match="decide='dice': choose from threshold, systematic"):
        ActorPolicy(TokenPrune(), Widths(1, 0, 1), decide="dice")  # type: ignore[arg-type]
