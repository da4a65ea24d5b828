"""DORA's learner: the gated actor's odds, PPO with several heads, whole runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import same
from helpers import source as digits_source
from test_gated import BLOCKS, half_pruned, pruner
from test_training import Crash, crash, ending, on_call
from torch import Tensor
from torch.testing import assert_close

import agents
from agents.learners.critic import certainty
from agents.learners.ppo import PPO, centre_groups, normalise_advantage, surgery
from agents.learners.rollout import Columns
from agents.policies import load_policy
from agents.policies.gated import GatedPolicy
from agents.policies.trainable import columns
from agents.systems.dora import DoraConfig, DoraPruneConfig
from agents.systems.rl4evit import RL4EViTConfig
from agents.systems.settings import preset, with_settings
from agents.training.held_back import HeldBack
from agents.training.priced_game import PricedGame
from agents.training.trainer import Trainer
from tokenenv import UserError, load_backbone
from tokenenv.game.rules import LayerPrune
from tokenenv.storage import read_tensors, write_tensors
from tokenenv.vit.backbone import Backbone


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone()


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
    # A gradient that is missing is one of zeros.
    for one, other in (([1.0, 1.0], [-1.0, 0.0]), ([-1.0, 0.0], [1.0, 1.0])):
        parts = [
            tuple(None if number == 0 else torch.tensor([number]) for number in vector)
            for vector in (one, other)
        ]
        found = torch.cat(surgery(*parts)).tolist()
        assert found == pytest.approx([-0.5, 1.5]) == cut([*one, 0.0], [*other, 0.0])[:2]


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


@pytest.mark.parametrize(
    ("settings", "blocks"),
    [
        ({}, range(3, 12)),
        ({"skip": 0.0}, range(12)),
        ({"skip": 0.99}, [11]),
        ({"blocks": (0, 5)}, [0, 5]),
    ],
)
def test_who_decides_where_no_blocks_are_named(
    backbone: Backbone, settings: Any, blocks: Any
) -> None:
    game = DoraConfig(**settings).game(backbone, digits_source())
    assert game.rules.blocks == tuple(blocks)
    assert DoraConfig.for_digits().game(backbone, digits_source()).steps == 12


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
    backbone: Backbone, config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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

    back.trained_on = ""  # else the name alone refuses another model
    monkeypatch.setattr(type(back.rules), "agent_dim", lambda self, backbone: game.agent_dim + 1)
    with pytest.raises(UserError, match=r"trained for '' .* model 'other' gives") as bad:
        back.check_fit(game.backbone, "other")
    assert "\n" not in str(bad.value)
    monkeypatch.undo()
    back.check_fit(game.backbone, "other")


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
        with pytest.raises(
            UserError, match=r"is not a policy of this version|no class of that name"
        ) as caught:
            load_policy(path)
        assert "\n" not in str(caught.value)


def trainer(config: Any, backbone: Backbone, out: Path) -> Trainer:
    """A small run as the command line makes it."""
    torch.manual_seed(0)
    fit, held_back = digits_source().split(0.2, 0)
    game = config.game(backbone, fit)
    game.seed(0)
    policy = config.policy(game, "small")
    priced = PricedGame(game, config, HeldBack(backbone, held_back))
    return Trainer(
        config.learner(policy, game, 0), priced, priced.judge, out, updates=config.updates,
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
    assert with_settings(DoraConfig(), {"target_drop": "0.01"}).calibrate == 0
    assert with_settings(DoraConfig(), {"target_drop": "0.01", "calibrate": "3"}).calibrate == 3
    assert with_settings(DoraConfig(), {"target_saving": "20"}).calibrate == DoraConfig().calibrate


def test_a_setting_of_many_values_is_a_tuple() -> None:
    with pytest.raises(UserError, match=r"initial_budget=12.0.*a tuple, such as \(12.0,\)"):
        DoraPruneConfig(initial_budget=12.0)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"hidden=32.*a tuple"):
        DoraConfig(hidden=32)  # type: ignore[arg-type]


def test_what_a_system_starts_from_depends_on_the_model() -> None:
    assert preset(DoraPruneConfig, "vit_tiny_patch16_224") == DoraPruneConfig()
    assert preset(DoraPruneConfig, None) == DoraPruneConfig.for_digits()
    assert preset(DoraPruneConfig, "digits_vit") == DoraPruneConfig.for_digits()
    assert preset(DoraPruneConfig, "digits_vit_16") == DoraPruneConfig.for_large_digits()
    # Digits of either size are one and the same to those that know nothing else.
    assert preset(RL4EViTConfig, "digits_vit_16") == RL4EViTConfig.for_digits()


def test_other_blocks_than_the_presets_start_from_the_mean_of_its_budgets() -> None:
    for made in (DoraPruneConfig.for_digits(), DoraPruneConfig.for_large_digits()):
        assert len(made.initial_budget) == len(made.blocks) > 1
    start = dataclasses.replace(
        DoraPruneConfig(), blocks=(0, 2, 4), initial_budget=(120.0, 70.0, 20.0)
    )
    for blocks in ("3/5", "0/2/5", ""):
        assert with_settings(start, {"blocks": blocks}).initial_budget == (70.0,)
    assert with_settings(start, {"blocks": "0/2/4"}) == start
    assert with_settings(start, {"blocks": "", "target_drop": "0.01"}).calibrate == 0
    assert with_settings(DoraPruneConfig(), {"blocks": "3"}).initial_budget == (12.0,)
    assert with_settings(start, {"blocks": "3/5", "initial_budget": "7/6"}).initial_budget == (
        7.0,
        6.0,
    )
    assert with_settings(start, {"lr": "0.1"}).initial_budget == start.initial_budget


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
def test_the_critic_does_not_know_the_label(backbone: Backbone) -> None:
    game, policy, config = pruner(backbone)
    critic = config.learner(policy, game, 0).critic
    batch = game.stream.next()
    seen = columns(game.reset(batch))
    wrong = batch._replace(labels=(batch.labels + 1) % 10)
    other = columns(game.reset(wrong))
    assert not torch.equal(seen["state"], other["state"])
    assert torch.equal(critic(seen, None)["gate"], critic(other, None)["gate"])
    for logits, known in (
        (torch.tensor([[2.0, 0.0, 0.0]]), [0.7870, 0.6805, 0.6657]),
        (torch.zeros(1, 4), [0.25, 0.0, 1.3863]),
        (torch.zeros(1, 1), [1.0, 0.0, 0.0]),
    ):
        assert_close(certainty(logits), torch.tensor([known]), atol=1e-3, rtol=0)


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
