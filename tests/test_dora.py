"""DORA's learner: the gated actor's odds, PPO with several heads, whole runs."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import same
from helpers import source as digits_source
from test_training import Crash, crash, ending, on_call
from torch import Tensor
from torch.testing import assert_close

import agents
from agents.dora import DoraConfig, DoraPruneConfig
from agents.gated import GatedPolicy, plackett_luce
from agents.policy import load_policy
from agents.ppo import PPO, centre_groups, normalise_advantage, surgery
from agents.rollout import Columns, columns
from agents.settings import with_settings
from agents.storage import read_tensors, write_tensors
from agents.training import Trainer
from tokenenv import UserError, load_backbone
from tokenenv.backbone import Backbone
from tokenenv.commands.held_back import HeldBack
from tokenenv.commands.train import _Market
from tokenenv.game import Game
from tokenenv.rules import LayerPrune

BLOCKS = (1, 4, 7, 11)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone()


# The gated actor ---------------------------------------------------------------------------------
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
        "initial_gate": 0.5, "initial_budget": 40.0, "width": 16,
    } | kwargs  # fmt: skip
    config = DoraPruneConfig(**options)
    torch.manual_seed(0)
    game = config.game(backbone, digits_source())
    policy = config.policy(game, "digits_vit")
    torch.manual_seed(7)  # with which some gates open
    for parameter in policy.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    return game, policy, config


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


# PPO with several heads --------------------------------------------------------------------------
def test_surgery_by_hand() -> None:
    def cut(one: list[float], other: list[float]) -> list[float]:
        # In two parameters: the angle is that of all of them together.
        a, b = (
            tuple(torch.tensor(part) for part in (g[:1], g[1:]))
            for g in (one, other)
        )  # fmt: skip
        return torch.cat(surgery(a, b)).tolist()

    assert cut([1.0, 2.0, 0.0], [3.0, -1.0, 5.0]) == [4.0, 1.0, 5.0]  # no conflict: the sum
    assert cut([1.0, 0.0, 0.0], [0.0, 1.0, 0.0]) == [1.0, 1.0, 0.0]
    # (1, 0) and (-1, 1): each loses what points against the other.
    assert cut([1.0, 0.0, 0.0], [-1.0, 1.0, 0.0]) == pytest.approx([0.5 + 0.0, 0.5 + 1.0, 0.0])
    # (2, 0) and (-1, 0): nothing is left of either.
    assert cut([2.0, 0.0, 0.0], [-1.0, 0.0, 0.0]) == pytest.approx([0.0, 0.0, 0.0], abs=1e-6)
    lone = torch.tensor([1.0])
    assert surgery((lone, None, None), (None, lone, None)) == [lone, lone, None]


def test_what_is_left_of_two_gradients_does_not_conflict() -> None:
    generator = torch.Generator().manual_seed(0)
    conflicts = 0
    for _ in range(40):
        a, b = torch.randn(2, 5, generator=generator)
        got = surgery((a,), (b,))[0]
        assert got @ a >= -1e-5 and got @ b >= -1e-5
        conflicts += bool(a @ b < 0)
        if a @ b >= 0:
            assert_close(got, a + b)
    assert 5 < conflicts < 35


def test_each_head_has_its_own_advantage(backbone: Backbone) -> None:
    """GAE from the gate's values; R = A + V; the others' is R less their own value."""
    game, policy, config = pruner(backbone, initial_gate=0.5, lam=0.7, batch=6, repeats=2)
    learner = config.learner(policy, game, 0)
    for parameter in learner.critic.parameters():  # values of heads and images differ
        parameter.data += 0.5 * torch.randn_like(parameter)
    rollout, last, last_active = learner.collect()
    assert rollout.done[-1].all() and not rollout.done[:-1].any()
    reward = rollout.reward[..., 0]
    value = {name: v[..., 0] for name, v in rollout.value.items()}
    possible = rollout.mask["gate"][..., 0]
    assert possible.all()
    returns, advantage = torch.zeros_like(reward), torch.zeros_like(reward)
    for b in range(6):
        gae, after = 0.0, 0.0
        for t in reversed(range(len(BLOCKS))):
            now = value["gate"][t, b].item()
            gae = reward[t, b].item() + after - now + 0.7 * gae
            advantage[t, b], returns[t, b] = gae, gae + now
            after = now
    expected = {"gate": advantage} | {h: returns - value[h] for h in ("budget", "selector")}
    counts = {
        "gate": possible, "budget": rollout.mask["budget"][..., 0],
        "selector": rollout.mask["selector"].any(2),
    }  # fmt: skip
    assert torch.equal(counts["budget"], rollout.choice["gate"][..., 0])
    got = learner._credit(rollout, last, last_active)
    for name, mask in counts.items():
        assert mask.sum() > 0 and (name == "gate" or mask.sum() < mask.numel())
        raw = torch.where(mask, expected[name], 0.0)[..., None]
        wanted = centre_groups(raw, mask[..., None], 2)
        wanted = normalise_advantage(wanted, mask[..., None], "global")
        assert_close(got[name], wanted, atol=1e-3, rtol=1e-3)
    values = returns.flatten()
    spread = values.std(unbiased=False)
    assert_close(got["returns"][..., 0], (returns - values.mean()) / spread, atol=1e-2, rtol=1e-2)


def test_closed_gates_train_the_gate_only(backbone: Backbone) -> None:
    game, policy, config = pruner(backbone, initial_gate=0.5)
    learner = config.learner(policy, game, 0)
    rollout, last, last_active = learner.collect()
    flat = rollout.map(lambda t: t.flatten(0, 1))
    extra = {k: v.flatten(0, 1) for k, v in learner._credit(rollout, last, last_active).items()}
    closed = ~flat.choice["gate"][:, 0]
    assert 0 < closed.sum() < len(closed)
    reader = [*policy.enter.parameters(), *policy.encoder.parameters(),
              *policy.selector.parameters(), *policy.budget.parameters()]  # fmt: skip

    def gradients(seen: Columns, rows: Tensor) -> list[Tensor]:
        batch = flat.map(lambda t: t[rows])
        batch.seen = {name: value[rows] for name, value in seen.items()}
        learner.config = type(learner.config)(**vars(learner.config) | {"max_grad_norm": 1e9})
        state = {k: v.clone() for k, v in policy.state_dict().items()}
        learner._descend(batch, {k: v[rows] for k, v in extra.items()})
        policy.load_state_dict(state)
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in reader]

    everyone = torch.ones_like(closed)
    clean = gradients(flat.seen, everyone)
    assert all(g.abs().max() > 0 for g in clean[:2])
    noisy = {k: v.clone() for k, v in flat.seen.items()}
    noisy["agents"][closed] = 1e3 * torch.randn_like(noisy["agents"][closed])
    for one, other in zip(clean, gradients(noisy, everyone), strict=True):
        assert torch.equal(one, other)
    assert all((g == 0).all() for g in gradients(flat.seen, closed))


def test_shared_gradients_are_the_surgerys(backbone: Backbone) -> None:
    """After the backward pass the encoder has the two heads' gradients without their conflict."""
    game, policy, config = pruner(backbone, initial_gate=0.5)
    learner = config.learner(policy, game, 0)
    seen = half_pruned(game)
    _, choice = policy.draw(seen, torch.Generator().manual_seed(0))

    def losses() -> dict[str, Tensor]:
        heads = policy.score(seen, choice)
        found = {n: (h.log_prob * h.mask).sum() / h.mask.sum() for n, h in heads.items()}
        # The two are made to conflict.
        return found | {"selector": -0.5 * found["budget"] + 0.1 * found["selector"]}

    shared, pair = policy.shared()
    assert pair == ("budget", "selector")
    one, other = (
        torch.cat([g.flatten() for g in torch.autograd.grad(losses()[name], shared)])
        for name in pair
    )
    dot = float(one @ other)
    assert dot < 0
    expected = one - dot / one.new_tensor(float(other @ other)) * other
    expected = expected + other - dot / one.new_tensor(float(one @ one)) * one
    gate = torch.autograd.grad(losses()["gate"], list(policy.gate.parameters()))
    learner.actor_optimiser.zero_grad()
    learner._backward(losses())
    got = torch.cat([p.grad.flatten() for p in shared])
    assert_close(got, expected, atol=1e-6, rtol=1e-3)
    for parameter, gradient in zip(policy.gate.parameters(), gate, strict=True):
        assert_close(parameter.grad, gradient)


def test_the_papers_learning_rates() -> None:
    """papers.md section 1.2: gate and budget 5e-5, what reads and selects 2e-5."""
    policy = GatedPolicy(LayerPrune((0, 1), "tokens"), {"key": 4, "own": 4, "patches": 9}, width=8)
    (fast, one), (slow, part) = policy.rates()
    assert part / one == pytest.approx(2e-5 / 5e-5)
    names = {id(p): name.split(".")[0] for name, p in policy.named_parameters()}
    assert {names[id(p)] for p in fast} == {
        "gate", "gate_block", "budget", "budget_block"
    }  # fmt: skip
    assert len(fast) + len(slow) == len(names) == len({id(p) for p in [*fast, *slow]})


SETTINGS = {
    "blocks": (2, 5), "batch": 32, "repeats": 4, "penalty": 20.0, "lr": 1e-2, "minibatches": 2,
}  # fmt: skip
CONFIGS = pytest.mark.parametrize("config", [DoraConfig, DoraPruneConfig])


@CONFIGS
def test_it_learns(backbone: Backbone, config: Any) -> None:
    """It earns more on images of every kind than it did, and than doing nothing would: 0."""
    config = config(**SETTINGS)
    torch.manual_seed(0)
    game = config.game(backbone, digits_source())
    game.seed(0)
    policy = config.policy(game, "digits_vit")
    learner = config.learner(policy, game, 0)
    for _ in game.prepare():
        pass
    earned = [learner.update()["reward"] for _ in range(14)]
    first, last = sum(earned[:3]) / 3, sum(earned[-3:]) / 3
    assert last > first + 1.5 and last > 1.2 * first > 0


# On disk -----------------------------------------------------------------------------------------
@CONFIGS
def test_a_saved_policy_has_no_critic_and_decides_alike(
    backbone: Backbone, config: Any, tmp_path: Path
) -> None:
    config = config(**SETTINGS | {"batch": 8, "critic_depth": 1})
    torch.manual_seed(0)
    game = config.game(backbone, digits_source())
    policy = config.policy(game, "digits_vit")
    learner = config.learner(policy, game, 0)
    learner.update()
    for parameter in policy.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    policy.threshold = 0.01
    policy.save(tmp_path / "policy.safetensors")
    tensors, _ = read_tensors(tmp_path / "policy.safetensors")
    assert tensors.keys() == {name for name, _ in policy.named_parameters()}
    assert sum(t.numel() for t in tensors.values()) * 2 < sum(
        p.numel() for p in learner.critic.parameters()
    )
    back = agents.load(tmp_path)
    assert back.config() == policy.config() and back.rules == policy.rules
    seen, acted = game.reset(), 0
    while seen is not None:
        action = policy.act(seen)
        assert torch.equal(action, back.act(seen))
        acted += int((~policy.kept(action) & seen.active).sum())
        seen = game.step(action).observation
    assert acted > 0

    with pytest.raises(UserError, match=r"trained for 'digits_vit' .* model 'other' gives") as bad:
        back.check(game.agent_dim + 1, game.shared_dim, "other")
    assert "\n" not in str(bad.value)
    back.check(game.agent_dim, game.shared_dim, "other")


def test_a_file_whose_class_and_rules_do_not_go_together(
    backbone: Backbone, tmp_path: Path
) -> None:
    _, policy, _ = pruner(backbone)
    path = tmp_path / "policy.safetensors"
    good = policy.config()
    for change in (
        {"rules": {"class": "LayerMerge"}},
        {"rules": {"class": "Unknown"}},
        {"class": "Unknown"},
        {"widths": {"key": 1, "own": 2, "patches": 64}},
        {"surprise": 1},
    ):
        write_tensors(path, dict(policy.state_dict()), good | change)
        with pytest.raises(UserError, match="is not a policy of this version") as caught:
            load_policy(path)
        assert "\n" not in str(caught.value)


def trainer(config: Any, backbone: Backbone, out: Path) -> Trainer:
    """A small run as the command line makes it."""
    torch.manual_seed(0)
    fit, held_back = digits_source().split(0.2, 0)
    game = config.game(backbone, fit)
    game.seed(0)
    policy = config.policy(game, "small")
    market = _Market(game, config, HeldBack(backbone, held_back))
    return Trainer(
        config.learner(policy, game, 0), market, market.judge, out, updates=config.updates,
        evaluate_every=config.evaluate_every, target_saving=config.target_saving, config={},
    )  # fmt: skip


@CONFIGS
def test_a_broken_run_resumes_exactly(
    backbone: Backbone, config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The closed loop's price, too, is remembered."""
    config = config(**SETTINGS | {"batch": 8, "updates": 4, "epochs": 2, "evaluate_every": 2})
    whole = trainer(config, backbone, tmp_path / "whole")
    whole.run()
    prices = set()
    for call in (2, 2 * 4 + 3, 3 * 4 + 1):  # four descents in an update
        out = tmp_path / str(call)
        with monkeypatch.context() as patch, pytest.raises(Crash):
            patch.setattr(PPO, "_descend", on_call(call, crash, PPO._descend))
            trainer(config, backbone, out).run()
        again = trainer(config, backbone, out)
        torch.manual_seed(99)  # whatever else drew numbers in between
        again.resume()
        assert again.done == (call - 1) // 8 * 2
        prices.add(again.learner.arena.reward.penalty)
        again.run()
        assert same(ending(out), ending(tmp_path / "whole"))
    prices.add(whole.learner.arena.reward.penalty)
    assert len(prices) == 3 and config.penalty not in prices


# Settings ----------------------------------------------------------------------------------------
def test_a_target_drop_is_measured_at_the_threshold_of_training() -> None:
    assert with_settings(DoraConfig(), ["target_drop=0.01"]).calibrate == 0
    assert with_settings(DoraConfig(), ["target_drop=0.01", "calibrate=3"]).calibrate == 3
    assert with_settings(DoraConfig(), ["target_saving=20"]).calibrate == DoraConfig().calibrate


def test_the_critic_of_the_selector_is_told_how_many_leave(backbone: Backbone) -> None:
    for critic in ("privileged", "symmetric"):
        game, policy, config = pruner(backbone, critic=critic, critic_depth=1, initial_gate=0.5)
        learner = config.learner(policy, game, 0)
        seen = half_pruned(game)
        _, choice = policy.draw(seen, torch.Generator().manual_seed(0))
        with torch.no_grad():
            values = learner.critic(seen, choice)
            other = learner.critic(seen, choice | {"share": choice["share"] + 0.1})
            assert learner.critic(seen, None).keys() == {"gate", "budget"}
        assert {name: v.shape for name, v in values.items()} == dict.fromkeys(policy.heads, (12, 1))
        for name in policy.heads:
            assert torch.equal(values[name], other[name]) == (name != "selector")


@torch.no_grad()
def test_the_critic_reads_living_tokens_only(backbone: Backbone) -> None:
    """Zeros behind the last token are not there: cut off, they leave the values as they are."""
    game, policy, config = pruner(backbone, critic_depth=2)
    critic = config.learner(policy, game, 0).critic
    seen = half_pruned(game)
    values = critic(seen, None)["gate"]
    for i in range(3):
        tokens = seen["tokens"][i][~(seen["tokens"][i] == 0).all(1)][None]
        alone = {"state": seen["state"][i : i + 1], "tokens": tokens}
        assert_close(critic(alone, None)["gate"], values[i : i + 1], atol=1e-5, rtol=1e-4)
        moved = {"state": alone["state"], "tokens": F.pad(tokens[:, :-1], (0, 0, 0, 1))}
        assert not torch.equal(critic(moved, None)["gate"], values[i : i + 1])


@pytest.mark.parametrize("width", [1, 48, 64, 128, 200])
def test_a_critic_of_any_width(backbone: Backbone, width: int) -> None:
    game, policy, config = pruner(backbone, critic_width=width, critic_depth=1)
    seen = half_pruned(game)
    values = config.learner(policy, game, 0).critic(seen, None)
    assert values["gate"].shape == (12, 1) and values["gate"].isfinite().all()
