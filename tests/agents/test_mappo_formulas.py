"""The formulas of MAPPO: advantages, losses, normalisation, computed another way."""

import numpy as np
import pytest
import torch
from helpers import small
from torch.testing import assert_close

from agents.learners.arena import PettingZooArena
from agents.learners.mappo import MAPPO, MAPPOConfig
from agents.learners.ppo import centre_groups, normalise_advantage, policy_loss, value_loss
from agents.learners.rollout import advantages
from agents.learners.value_norm import ValueNorm
from agents.policies.actor import ActorPolicy, Widths
from agents.policies.networks import SharedMLP
from tokenenv import token_prune_v0
from tokenenv.errors import UserError
from tokenenv.game.build import build_game


def test_gae_by_hand() -> None:
    """Constant value 1, reward 1: delta = gamma, A_t = sum of (gamma lambda)^k gamma."""
    ones = torch.ones(3, 1, 2)
    active = torch.ones(3, 1, 2, dtype=torch.bool)
    done = torch.zeros(3, 1, dtype=torch.bool)
    got, returns = advantages(ones, ones, active, done, ones[0], active[0], gamma=0.9, lam=0.5)
    delta, factor = 0.9, 0.45
    expected = torch.tensor([delta * (1 + factor + factor**2), delta * (1 + factor), delta])
    assert_close(got[:, 0, 0], expected)
    assert_close(returns, got + 1)


def test_gae_stops_at_the_end_of_an_episode() -> None:
    reward = torch.tensor([1.0, 2.0, 4.0])[:, None, None]
    value = torch.zeros(3, 1, 1)
    active = torch.ones(3, 1, 1, dtype=torch.bool)
    done = torch.tensor([False, True, False])[:, None]
    got, _ = advantages(
        reward, value, active, done, torch.full((1, 1), 8.0), active[0], gamma=1.0, lam=1.0
    )
    assert got[:, 0, 0].tolist() == [3.0, 2.0, 12.0]


def test_a_dead_agents_later_pay_counts_in_full() -> None:
    """Active at t=0 only: what t=1 and t=2 still pay belongs to its one decision."""
    reward = torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    value = torch.tensor([5.0, 777.0, -777.0])[:, None, None]  # nobody may read the last two
    active = torch.tensor([True, False, False])[:, None, None]
    done = torch.tensor([False, False, True])[:, None]
    got, returns = advantages(
        reward, value, active, done, torch.zeros(1, 1), active[1], gamma=0.5, lam=0.3
    )
    assert got[:, 0, 0].tolist() == [1 + 5 + 25 - 5, 0, 0]
    assert returns[0, 0, 0] == 31


@pytest.mark.parametrize("alive", [0.6, 1.0])
def test_losses_equal_the_formula_and_ignore_the_dead(alive: float) -> None:
    generator = torch.Generator().manual_seed(0)
    log_prob, old, advantage, value, old_value, returns = torch.randn(6, 40, 5, generator=generator)
    active = torch.rand(40, 5, generator=generator) < alive
    total = count = value_total = clipped_count = 0.0
    for i in range(40):
        for j in range(5):
            if not active[i, j]:
                continue
            ratio = np.exp(float(log_prob[i, j] - old[i, j]))
            a = float(advantage[i, j])
            total += min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
            clipped_count += abs(ratio - 1) > 0.2
            v, v0, r = float(value[i, j]), float(old_value[i, j]), float(returns[i, j])
            near = v0 + min(max(v - v0, -0.2), 0.2)

            def huber(e: float) -> float:
                return 0.5 * e * e if abs(e) <= 1.5 else 1.5 * (abs(e) - 0.75)

            value_total += max(huber(v - r), huber(near - r))
            count += 1
    loss, clipped = policy_loss(log_prob, old, advantage, active, 0.2)
    assert_close(loss.item(), -total / count, atol=1e-5, rtol=1e-5)
    assert_close(clipped.item(), clipped_count / count)
    got = value_loss(value, old_value, returns, active, clip=0.2, huber_delta=1.5)
    assert_close(got.item(), value_total / count, atol=1e-5, rtol=1e-5)


def test_advantages_are_normalised_over_the_active() -> None:
    generator = torch.Generator().manual_seed(0)
    advantage = 3 + 5 * torch.randn(4, 6, 3, generator=generator)
    active = torch.rand(4, 6, 3, generator=generator) < 0.5
    advantage[~active] = 1e6
    got = normalise_advantage(advantage, active, "global")
    assert abs(got[active].mean()) < 1e-5
    assert abs(got[active].std(unbiased=False) - 1) < 1e-4
    per_agent = normalise_advantage(advantage, active, "per_agent")
    for j in range(3):
        assert abs(per_agent[:, :, j][active[:, :, j]].mean()) < 1e-5


@pytest.mark.parametrize("own", [False, True])
def test_groups_are_centred(own: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    advantage = torch.randn(2, 6, 3, generator=generator)
    advantage += torch.tensor([5.0, 5, -7, -7, 0, 0])[:, None]  # what the image made of it
    active = torch.rand(2, 6, 3, generator=generator) < 0.8
    got = centre_groups(advantage, active, 2, own)
    for t in range(2):
        for g in range(3):
            for agents in [slice(j, j + 1) for j in range(3)] if own else [slice(0, 3)]:
                part, mask, raw = (
                    x[t, 2 * g : 2 * g + 2, agents] for x in (got, active, advantage)
                )
                assert_close(part[mask], raw[mask] - raw[mask].mean())
                assert (part[~mask] == 0).all()


@pytest.mark.parametrize("centralised", [True, False])
def test_an_independent_learners_baseline_is_its_own(centralised: bool) -> None:
    game = build_game(**small(batch_size=8, repeats=4, blocks=(1, 3), features=("position",)))
    policy = ActorPolicy(game.rules, Widths(game.agent_dim, game.shared_dim, game.state_dim))
    config = MAPPOConfig(steps=2, repeats=4, centralised=centralised)
    learner = MAPPO(policy, game, config)
    rollout, last, alive = learner.collect()
    active = rollout.seen["active"]
    credit = learner._credit(rollout, last, alive)["action"]
    # Two images, four times each: what an agent's credits in these four add up to.
    sums = (credit * active).view(2, 2, 4, game.agents).sum(2)
    assert abs(sums.sum(2)).max() < 1e-3 < credit.abs().max()
    assert (sums.abs().max() < 1e-3) != centralised


def test_value_norm_forgets_and_skips_the_inactive() -> None:
    norm = ValueNorm()
    assert norm.normalise(torch.tensor(3.0)) == 3.0
    active = torch.tensor([True, True, False])
    for level in [0.0] * 50 + [10.0] * 1500:
        norm.update(torch.tensor([level - 1, level + 1, 1e9]), active)
    assert_close(norm.normalise(torch.tensor(10.0)).item(), 0.0, atol=1e-2, rtol=0)
    assert_close(norm.normalise(torch.tensor(11.0)).item(), 1.0, atol=2e-2, rtol=0)
    x = torch.randn(5)
    assert_close(norm.denormalise(norm.normalise(x)), x, atol=1e-4, rtol=1e-4)
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    norm.update(torch.tensor([5.0]), torch.tensor([False]))
    assert all(torch.equal(before[k], v) for k, v in norm.state_dict().items())


def test_shared_network_equals_one_big_first_layer() -> None:
    torch.manual_seed(0)
    net = SharedMLP(5, 3, (8, 4), 2, gain=1.0)
    own, shared = torch.randn(2, 6, 5), torch.randn(2, 3)
    weight = torch.cat([net.own.weight, net.shared.weight], dim=1)
    joint = torch.cat([own, shared[:, None].expand(-1, 6, -1)], dim=-1)
    first = torch.nn.functional.linear(joint, weight, net.own.bias)
    expected = net.head(net.body(net.first_norm(first).relu()))
    assert_close(net(own, shared), expected)
    assert net.macs(torch.tensor(6.0)) == 6 * (5 * 8 + 8 * 4 + 4 * 2) + 3 * 8


@pytest.mark.parametrize(
    "bad", [{"steps": 0}, {"minibatches": 0}, {"repeats": 0}, {"advantage_norm": "x"}]
)
def test_settings_that_cannot_be(bad: dict) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        MAPPOConfig(**bad)


def test_value_norm_keeps_a_small_spread_around_a_large_mean() -> None:
    norm = ValueNorm()
    for _ in range(20):
        norm.update(torch.tensor([999.99, 1000.01]), torch.ones(2, dtype=torch.bool))
    assert_close(norm.normalise(torch.tensor(1000.01)).item(), 1.0, atol=0.05, rtol=0)


def test_who_stays_but_may_not_act_is_inactive() -> None:
    arena = PettingZooArena(
        lambda: token_prune_v0.parallel_env(max_cycles=2, mask_in="info", **small()), 2
    )
    seen = arena.reset()
    assert seen.active.all() and seen.legal.all()
    keep = torch.ones(2, arena.agents, dtype=torch.long)
    keep[:, :10] = 0
    seen = arena.step(keep).observation
    assert not seen.active[:, :10].any() and seen.active[:, 10:].all()
    assert seen.legal[..., 0].all() and torch.equal(seen.legal[..., 1], seen.active)
