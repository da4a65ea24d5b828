"""Recorded episodes: known owners, costs, classes, chances and rewards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from actors import steady
from helpers import PATCHES, backbone, source

from agents.policies.actor import ActorPolicy
from agents.policies.dynamicvit import DynamicViTPolicy
from agents.policies.gated import GatedPolicy
from agents.policies.words import parse_policy
from tokenenv.errors import UserError
from tokenenv.game.build import build_reward
from tokenenv.game.cost import Cost
from tokenenv.game.policy import Policy, play
from tokenenv.game.rewards import Outcome, Turn
from tokenenv.game.rules import LayerMerge, LayerPrune, Rules, TokenPrune
from tokenenv.measure.episodes import Recorded, record


def recorded(method: object, count: int = 3) -> Recorded:
    return record(backbone(), method, source(), source().batch(torch.arange(count)))  # type: ignore[arg-type]


def actor(rules: Rules, chance: float) -> ActorPolicy:
    policy = steady(backbone(), rules, chance)
    policy.decide = "threshold"
    return policy


@pytest.mark.parametrize("what", ["tome:r=8,blocks=2/5", "evit:keep=0.5,blocks=2/5"])
def test_costs_start_at_the_dense_models_and_end_at_those_of_the_evaluation(what: str) -> None:
    model = backbone()
    method, images = parse_policy(what, model.depth), source().batch(torch.arange(3)).images
    found = recorded(method)
    assert found.blocks == [2, 5] and found.dense_macs == Cost(model).dense()
    first, middle, last = (found.saved(step) for step in found.steps)
    assert np.abs(first).max() < 1e-9
    assert (middle > 0).all() and (last > middle).all()
    macs = Cost(model).of(play(model, method, images), method)
    assert found.steps[2].macs == pytest.approx(macs.numpy())


def test_before_any_decision_the_classes_are_those_of_the_dense_model() -> None:
    model, batch = backbone(), source().batch(torch.arange(3)).images
    method = parse_policy("tome:r=8,blocks=2/5", model.depth)
    found = recorded(method)
    with torch.inference_mode():
        dense, last = model(batch).softmax(1), play(model, method, batch).logits.softmax(1)
    assert found.steps[0].probabilities == pytest.approx(dense.numpy(), abs=1e-5)
    assert found.steps[-1].probabilities == pytest.approx(last.numpy(), abs=1e-5)


def test_owners_count_as_many_tokens_as_are_left() -> None:
    for what in ("tome:r=8,blocks=2/5", "random:keep=0.5,blocks=2/5"):
        for step in recorded(parse_policy(what, 6)).steps:
            for owners, tokens in zip(step.owners, step.tokens, strict=True):
                assert len(np.unique(owners[owners >= 0])) == tokens


def test_between_decisions_the_last_state_stays() -> None:
    found = recorded(parse_policy("tome:r=8,blocks=2/5", 6))
    shown = [found.at(block).block for block in (None, 0, 2, 3, 4, 5, 11)]
    assert shown == [None, None, 2, 2, 2, 5, 5]


def test_methods_without_agents_have_neither_chances_nor_rewards() -> None:
    found = recorded(parse_policy("evit:keep=0.5,blocks=2/5", 6))
    assert found.reward == ""
    assert [(s.chance, s.reward) for s in found.steps] == [(None, None)] * 3


def test_the_chance_of_a_token_is_that_of_its_agent() -> None:
    found = recorded(actor(TokenPrune((2, 4)), 0.8))
    for step in found.steps[1:]:
        assert step.chance == pytest.approx(np.full((3, PATCHES), 0.2), abs=1e-6)


def test_the_agent_of_a_pruned_token_has_no_chance() -> None:
    first, second = recorded(steady(backbone(), TokenPrune((2, 4)), 0.5)).steps[1:]
    gone = first.owners < 0
    assert gone.any() and not gone.all()
    assert second.chance is not None and (np.isnan(second.chance) == gone).all()


def test_only_candidates_have_a_chance_to_be_merged() -> None:
    first = recorded(actor(LayerMerge((2, 4)), 0.3)).steps[1]
    assert first.chance is not None
    known = ~np.isnan(first.chance)
    assert (known.reshape(3, -1, 2) == [True, False]).all()  # every second token proposes
    assert first.chance[known] == pytest.approx(0.3, abs=1e-6)


class Halves(Policy):
    """Prunes the left half of the patches at the first decision, nothing later."""

    rules = TokenPrune((2, 4))

    def act(self, observation):  # type: ignore[no-untyped-def]
        keep = torch.ones_like(observation.active, dtype=torch.long)
        if observation.step == 0:
            keep[:, : PATCHES // 2] = 0
        return keep


def test_rewards_are_those_of_the_game() -> None:
    batch = source().batch(torch.arange(3))
    found = recorded(Halves())
    assert found.reward == "alpha_beta"
    reward = build_reward(None, None, Halves.rules, PATCHES)
    whole = torch.ones(3, PATCHES, dtype=torch.bool)
    half = whole.clone()
    half[:, : PATCHES // 2] = False
    with torch.inference_mode():
        logits = play(backbone(), Halves(), batch.images).logits
        outcome = Outcome(logits, batch.labels, backbone()(batch.images))
    turns = (
        Turn(0, 2, whole, half, (half,), None, 2, 6),
        Turn(1, 2, half, half, (half, half), outcome, 4, 6),
    )
    for step, turn in zip(found.steps[1:], turns, strict=True):
        assert step.reward == pytest.approx(reward(turn).float().numpy())


def test_without_labels_rewards_take_the_dense_models_class() -> None:
    batch = source().batch(torch.arange(3))
    unknown = batch._replace(labels=torch.full((3,), -1))
    with torch.inference_mode():
        known = batch._replace(labels=backbone()(batch.images).argmax(1))
    one, other = (record(backbone(), Halves(), source(), b) for b in (unknown, known))
    for left, right in zip(one.steps[1:], other.steps[1:], strict=True):
        assert left.reward is not None and (left.reward == right.reward).all()


def test_chances_of_another_shape_are_refused() -> None:
    class Odd(Halves):
        def chances(self, observation):  # type: ignore[no-untyped-def]
            return torch.ones(len(observation.active), 3)

    with pytest.raises(UserError, match=r"Odd.chances\(\) gave \(3, 3\) for actions \(3, 64\)"):
        recorded(Odd())


def test_a_gate_opens_from_its_threshold_on() -> None:
    rules = LayerPrune((2, 4), action="tokens")
    model = backbone()
    widths = {
        "key": model.attention_dim(2), "own": rules.agent_dim(model), "patches": PATCHES,
    }  # fmt: skip
    for gate, pruned in ((0.9, True), (0.1, False)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            policy = GatedPolicy(rules, widths, initial_gate=gate).eval()
        found = recorded(policy)
        for before, step in zip(found.steps, found.steps[1:], strict=False):
            assert step.chance is not None
            alive = before.owners >= 0
            assert (np.isnan(step.chance) == ~alive).all()
            assert step.chance[alive] == pytest.approx(gate, abs=0.05)
            assert ((step.tokens < before.tokens) == pruned).all()


def test_dynamicvit_prunes_what_it_is_likeliest_to_prune() -> None:
    rules = TokenPrune((2,), features=("token",), share=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = DynamicViTPolicy(rules, backbone().dim, 0.5).eval()
    _, step = recorded(policy).steps
    assert step.chance is not None
    for chance, owners in zip(step.chance, step.owners, strict=True):
        assert ((chance > 0) & (chance < 1)).all()
        assert chance[owners < 0].min() >= chance[owners >= 0].max()
