"""The gated actor: its probabilities, its draws and its decision."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from helpers import source as digits_source
from torch import Tensor
from torch.testing import assert_close

from agents.policies.gated import GatedPolicy, plackett_luce
from agents.policies.trainable import Columns, columns
from agents.systems.dora import DoraPruneConfig
from tokenenv import load_backbone
from tokenenv.game import Game
from tokenenv.game.rules import LayerPrune
from tokenenv.vit.backbone import Backbone

BLOCKS = (1, 4, 7, 11)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone()


def test_plackett_luce_sums_to_one_over_all_orders() -> None:
    score = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=torch.float64)
    orders = list(itertools.permutations(range(4)))
    terms = plackett_luce(score[torch.tensor(orders)])
    assert_close(terms.sum(1).exp().sum().item(), 1.0)
    # So do the first two picks, over all ordered pairs.
    pairs = {order[:2]: t[:2].sum().exp().item() for order, t in zip(orders, terms, strict=True)}
    assert len(pairs) == 12 and sum(pairs.values()) == pytest.approx(1.0)
    p = score.softmax(0)
    assert pairs[2, 0] == pytest.approx((p[2] * p[0] / (1 - p[2])).item())
    # One that may not be drawn takes no part.
    five = torch.cat([score, torch.tensor([-1e9], dtype=torch.float64)])
    assert_close(plackett_luce(five)[:4], plackett_luce(score))


def pruner(
    backbone: Backbone, noise: float = 0.4, **kwargs: Any
) -> tuple[Game, GatedPolicy, DoraPruneConfig]:
    """A small game of pruning, and an actor whose decisions depend on the image."""
    options = {
        "blocks": BLOCKS, "batch": 12, "repeats": 1, "epochs": 1, "minibatches": 1,
        "initial_gate": 0.5, "initial_budget": (40.0,), "width": 16,
    } | kwargs  # fmt: skip
    config = DoraPruneConfig(**options)
    torch.manual_seed(0)
    game = config.game(backbone, digits_source())
    policy = config.policy(game, "digits_vit")
    torch.manual_seed(7)  # with which some gates open
    for parameter in policy.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    return game, policy, config


@pytest.mark.parametrize("budgets", [(8.0,), (20.0, 6.0, 12.0, 4.0)])
def test_training_starts_near_the_given_budgets(
    backbone: Backbone, budgets: tuple[float, ...]
) -> None:
    game, policy, _ = pruner(backbone, noise=0.0, initial_gate=0.999, initial_budget=budgets)
    generator, observation = torch.Generator().manual_seed(3), game.reset()
    took, drawn = [], []
    for _ in BLOCKS:
        assert observation is not None
        action = policy.act(observation)
        (leave,) = set((action == 0).sum(1).tolist())
        took.append(leave)
        _, choice = policy.draw(columns(observation), generator)
        drawn.append(policy.budgets[choice["budget"]].float().mean().item())
        observation = game.step(action).observation
    assert took == [int(b) for b in (budgets * 4)[:4]]
    assert drawn == pytest.approx(took, rel=0.35)


def half_pruned(game: Game) -> Columns:
    """What is seen at the second decision, with another half gone from every image."""
    game.reset()
    generator = torch.Generator().manual_seed(5)
    action = (torch.rand(game.batch_size, game.agents, generator=generator) < 0.6).long()
    return columns(game.step(action).observation)


@torch.no_grad()
def by_hand(policy: GatedPolicy, seen: Columns, i: int) -> tuple[float, Tensor, Any]:
    """One image, its living tokens only: gate's probability, budget's, scores for a count."""
    key, block, history = seen["shared"][i].split([policy.widths["key"], len(BLOCKS), 3])
    gate = policy.gate(torch.cat([key, policy.gate_block(block), history])).sigmoid().item()
    own = seen["agents"][i][seen["active"][i]]
    first = policy.enter_class(key) + policy.block(block) + policy.history(history)
    rest = policy.enter(own) + policy.block(block)
    z = policy.encoder(torch.cat([first[None], rest])[None])[0]
    feasible = [k for k in policy.budgets.tolist() if k <= len(own) - 4]
    budget = (policy.budget(z[0]) + policy.budget_block(block))[: len(feasible)].softmax(0)

    def scores(count: int) -> Tensor:
        told = z[1:] + policy.count(torch.tensor([count / len(own)]))
        return policy.selector(told)[:, 0] + own @ policy.skip(block)

    return gate, budget, scores


def test_probabilities_agree_with_brute_force(backbone: Backbone) -> None:
    """An image at a time, without masks, a pick at a time."""
    game, policy, _ = pruner(backbone, initial_gate=0.5)
    seen = half_pruned(game)
    _, choice = policy.draw(seen, torch.Generator().manual_seed(0))
    heads = policy.score(seen, choice)
    assert tuple(heads) == policy.heads == ("gate", "budget", "selector")
    assert 0 < choice["gate"].sum() < 12
    for i in range(12):
        gate, budget, scores = by_hand(policy, seen, i)
        open_ = bool(choice["gate"][i])
        assert bool(heads["gate"].mask[i])
        assert heads["gate"].log_prob[i].exp().item() == pytest.approx(
            gate if open_ else 1 - gate, abs=1e-5
        )
        entropy = -(gate * math.log(gate) + (1 - gate) * math.log(1 - gate))
        assert heads["gate"].entropy[i].item() == pytest.approx(entropy, abs=1e-4)
        assert bool(heads["budget"].mask[i]) == open_
        if not open_:
            assert not heads["selector"].mask[i].any()
            continue
        index = int(choice["budget"][i])
        assert heads["budget"].log_prob[i].item() == pytest.approx(
            budget[index].log().item(), abs=1e-4
        )
        entropy = -(budget * budget.log()).sum().item()
        assert heads["budget"].entropy[i].item() == pytest.approx(entropy, abs=1e-4)
        count = int(policy.budgets[index])
        assert heads["selector"].mask[i].tolist() == [j < count for j in range(64)]
        living = seen["active"][i].nonzero()[:, 0].tolist()
        weight = dict(zip(living, scores(count).double().exp().tolist(), strict=True))
        for t, token in enumerate(choice["order"][i, :count].tolist()):
            expected = math.log(weight[token] / sum(weight.values()))
            assert heads["selector"].log_prob[i, t].item() == pytest.approx(expected, abs=1e-3)
            del weight[token]  # drawn once only


def test_the_decision_is_the_likeliest(backbone: Backbone) -> None:
    game, policy, _ = pruner(backbone, initial_gate=0.5)
    seen = half_pruned(game)
    action = policy.act(game._observe())
    opened = 0
    for i in range(12):
        gate, budget, scores = by_hand(policy, seen, i)
        if gate < 0.5:
            assert action[i].all()
            continue
        opened += 1
        count = int(policy.budgets[int(budget.argmax())])
        living = seen["active"][i].nonzero()[:, 0]
        leave = living[scores(count).topk(count).indices]
        assert set((action[i] == 0).nonzero()[:, 0].tolist()) == set(leave.tolist())
    assert 0 < opened < 12
    policy.threshold = 1.0
    assert policy.act(game._observe()).all()
    policy.threshold = 0.0
    assert (policy.act(game._observe()) == 0).any(1).all()


@pytest.mark.parametrize("selector", ["learned", "random", "redundancy"])
def test_so_many_distinct_living_tokens_are_drawn(backbone: Backbone, selector: str) -> None:
    game, policy, _ = pruner(backbone, initial_gate=0.5, selector=selector)
    seen, generator = half_pruned(game), torch.Generator().manual_seed(0)
    counts = set()
    for _ in range(20):
        action, choice = policy.draw(seen, generator)
        for i in range(12):
            gone = (action[i] == 0).nonzero()[:, 0].tolist()
            if not choice["gate"][i]:
                assert not gone
                continue
            count = int(policy.budgets[choice["budget"][i]])
            living = int(seen["active"][i].sum())
            assert sorted(choice["order"][i, :count].tolist()) == gone and len(gone) == count
            assert seen["active"][i][gone].all()
            assert living - count >= 4
            assert choice["share"][i].item() == pytest.approx(count / living)
            counts.add(count)
    assert len(counts) > 5


def test_a_random_selector_leaves_nothing_that_a_resumed_run_must_know(backbone: Backbone) -> None:
    game, policy, _ = pruner(backbone, initial_gate=0.9, selector="random")
    columns, generator = half_pruned(game), torch.Generator()
    seen = game._observe()
    policy.threshold = 0.0
    first = policy.act(seen)
    drawn = [policy.draw(columns, generator.manual_seed(1))[0] for _ in range(2)]
    assert torch.equal(policy.act(seen), first) and (first == 0).any(1).all()
    assert torch.equal(*drawn)
    gone = policy.draw(columns, generator.manual_seed(2))[0]
    assert not torch.equal(gone, drawn[0])


@pytest.mark.parametrize("left", [4, 5, 6])
def test_a_gate_without_a_budget_stays_closed(backbone: Backbone, left: int) -> None:
    game, policy, _ = pruner(backbone)
    with torch.no_grad():
        policy.gate[-1].bias.fill_(50.0)
    game.reset()
    action = torch.zeros(12, 64, dtype=torch.long)
    action[:, :left] = 1
    action[0] = 1
    observation = game.step(action).observation
    seen = columns(observation)
    drawn, choice = policy.draw(seen, torch.Generator().manual_seed(0))
    possible = [True] + [left == 6] * 11  # 4 stay, and the least budget is 2
    assert choice["gate"][:, 0].tolist() == possible
    assert policy.score(seen, choice)["gate"].mask[:, 0].tolist() == possible
    for decision in (drawn, policy.act(observation)):
        assert (decision == 0).any(1).tolist() == possible
        assert ((decision == 0).sum(1)[1:] == (2 if left == 6 else 0)).all()


def test_draws_are_as_frequent_as_they_are_likely() -> None:
    """Six tokens, budgets 1 and 2: 37 outcomes."""
    torch.manual_seed(1)
    rules = LayerPrune((0,), "tokens", budget_step=1)
    policy = GatedPolicy(rules, {"key": 3, "own": 2, "patches": 7}, width=8, initial_gate=0.7)
    for parameter in policy.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    assert policy.budgets.tolist() == [1, 2, 3]  # three is too many for six
    active = torch.tensor([[True, True, False, True, True, True, True]])
    one = {
        "agents": torch.randn(1, 7, 2) * active[..., None],
        "shared": torch.randn(1, 7),
        "active": active,
    }
    living = active[0].nonzero()[:, 0].tolist()
    outcomes: list[tuple[int, ...]] = [()]
    outcomes += [p for k in (1, 2) for p in itertools.permutations(living, k)]
    many = {name: value.expand(len(outcomes), *value.shape[1:]) for name, value in one.items()}
    count = torch.tensor([len(p) for p in outcomes])[:, None]
    # Who is not drawn comes later, the dead last.
    order = torch.tensor(
        [[*p, *(j for j in living if j not in p), *({*range(7)} - {*living})] for p in outcomes]
    )
    choice = {
        "gate": count > 0, "budget": (count - 1).clamp(min=0), "order": order, "share": count / 6
    }  # fmt: skip
    with torch.no_grad():
        heads = policy.score(many, choice)
        chance = sum((h.log_prob * h.mask).sum(1) for h in heads.values()).exp()
    assert chance.sum().item() == pytest.approx(1.0, abs=1e-5)

    tries = 40_000
    copies = {name: value.expand(tries, *value.shape[1:]) for name, value in one.items()}
    with torch.no_grad():
        _, drawn = policy.draw(copies, torch.Generator().manual_seed(0))
    found: dict[tuple[int, ...], int] = {}
    for gate, budget, order_ in zip(
        drawn["gate"][:, 0].tolist(), drawn["budget"][:, 0].tolist(), drawn["order"].tolist(),
        strict=True,
    ):  # fmt: skip
        outcome = tuple(order_[: budget + 1]) if gate else ()
        found[outcome] = found.get(outcome, 0) + 1
    assert set(found) <= set(outcomes)
    for outcome, p in zip(outcomes, chance.tolist(), strict=True):
        spread = math.sqrt(tries * p * (1 - p))
        assert abs(found.get(outcome, 0) - tries * p) < 5 * spread + 1, outcome
