"""The tensor game: rosters, repeats, privileged state, and rewards that are not finite."""

from dataclasses import dataclass

import pytest
import torch
from torch.testing import assert_close

from tokenenv import Cooperative, UserError, build_game, load_backbone
from tokenenv.game.episode import EXECUTIONS
from tokenenv.game.rewards import Turn


@pytest.fixture(scope="module")
def backbone():
    return load_backbone()


def test_a_pruned_agent_never_returns_and_sees_nothing(backbone) -> None:
    game = build_game(model=backbone, batch_size=4)
    seen = game.reset()
    generator = torch.Generator().manual_seed(0)
    dead = torch.zeros(4, 64, dtype=torch.bool)
    while seen is not None:
        assert torch.equal(seen.active, ~dead)
        assert (seen.agents[dead] == 0).all()
        assert (seen.agents[~dead].abs().sum(-1) > 0).all()
        action = (torch.rand(4, 64, generator=generator) < 0.7).long()
        dead = dead | (action == 0)
        transition = game.step(action)
        seen = transition.observation
    assert torch.equal(game.history[-1], ~dead)
    assert transition.done.all() and transition.outcome is not None


def test_all_executions_play_the_same_game(backbone) -> None:
    results = []
    for execution in EXECUTIONS:
        game = build_game(model=backbone, batch_size=8, execution=execution, reward="cooperative")
        game.seed(3)
        seen, rewards = game.reset(), []
        generator = torch.Generator().manual_seed(0)
        views = []
        while seen is not None:
            views.append((seen.agents, seen.state))
            transition = game.step((torch.rand(8, 64, generator=generator) < 0.6).long())
            rewards.append(transition.reward)
            seen = transition.observation
        results.append((views, torch.stack(rewards)))
    for views, rewards in results[1:]:
        for (own, state), (own2, state2) in zip(results[0][0], views, strict=True):
            assert_close(own, own2, atol=1e-4, rtol=0)
            assert_close(state, state2, atol=1e-4, rtol=0)
        assert_close(results[0][1], rewards, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rules", ["token_prune", "layer_merge", "layer_prune"])
@pytest.mark.parametrize("batch", [1, 5])
def test_half_precision_has_the_same_agents(rules: str, batch: int) -> None:
    """Rows are padded to sizes that recur there; no place without a token has an agent."""
    game = build_game(rules=rules, dtype="bfloat16", batch_size=batch, execution="packed")
    seen = game.reset()
    agents, steps = seen.active.shape[1], 0
    keeps = 1 if game.rules.last_keeps else 0
    action = torch.full((batch, agents), keeps)
    while seen is not None:
        assert seen.agents.shape[:2] == seen.active.shape == (batch, agents)
        if steps == 1:  # the last image goes on with all its tokens
            action[:-1, ::3] = 1 - keeps
        seen, steps = game.step(action).observation, steps + 1
    assert steps == game.steps >= 3 and int(game.counts[-1][-1]) == game.backbone.patches


def test_repeats_play_the_same_image(backbone) -> None:
    game = build_game(model=backbone, batch_size=8, repeats=4)
    seen = game.reset()
    assert len(game.index.unique()) == 2
    for part in (seen.agents, seen.state, game.images):
        assert torch.equal(part[0], part[3])
        assert not torch.equal(part[3], part[4])
    with pytest.raises(UserError, match="batch_size=6 must be a multiple of repeats=4"):
        build_game(model=backbone, batch_size=6, repeats=4)


def test_the_state_holds_how_sure_the_dense_model_is(backbone) -> None:
    game = build_game(model=backbone, batch_size=5)
    state = game.reset().state
    with torch.inference_mode():
        p = backbone(game.images).softmax(1)
    right = p[torch.arange(5), game.labels]
    assert_close(state[:, -3], right, atol=1e-5, rtol=0)
    entropy = torch.distributions.Categorical(probs=p).entropy()
    assert_close(state[:, -1], entropy, atol=1e-4, rtol=0)


def test_dense_logits_are_computed_once(backbone, monkeypatch) -> None:
    game = build_game(model=backbone, batch_size=16)
    for _ in game.prepare():
        pass
    calls = []
    monkeypatch.setattr(type(backbone), "forward", lambda self, x: calls.append(len(x)))
    game.reset()
    assert calls == []


def test_what_is_computed_in_advance_leaves_the_episode_alone(backbone) -> None:
    game = build_game(model=backbone, batch_size=4)
    game.reset()
    images = game.images.clone()
    for _ in game.prepare():
        pass
    assert torch.equal(game.images, images)


def test_keeping_everything_is_worth_the_full_fidelity(backbone) -> None:
    game = build_game(model=backbone, batch_size=4, reward=Cooperative(alpha=2.0, beta=0.01))
    game.reset()
    total = sum(game.step(torch.ones(4, 64)).reward for _ in range(3))
    assert_close(total, torch.full((4, 64), 2.0 - 3 * 0.01), atol=1e-4, rtol=0)


@dataclass
class Broken:
    value: float

    def __call__(self, turn: Turn) -> torch.Tensor:
        reward = torch.zeros(turn.after.shape)
        reward[0, 0] = self.value if turn.step == 1 else 0.0
        return reward


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_is_named(backbone, value: float) -> None:
    game = build_game(model=backbone, batch_size=2, reward=Broken(value))
    game.reset()
    with pytest.raises(UserError, match="reward Broken gave a value that is not finite"):
        for _ in range(3):
            game.step(torch.ones(2, 64))


def test_stepping_past_the_end_is_refused(backbone) -> None:
    game = build_game(model=backbone, batch_size=2)
    with pytest.raises(RuntimeError, match="call reset"):
        game.step(torch.ones(2, 64))
    game.reset()
    for _ in range(3):
        game.step(torch.ones(2, 64))
    with pytest.raises(RuntimeError, match="call reset"):
        game.step(torch.ones(2, 64))


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_block_in_which_no_image_of_a_ragged_batch_loses_a_token(backbone, execution) -> None:
    game = build_game(
        model=backbone, rules="layer_prune", action="count", batch_size=3, execution=execution
    )
    game.reset()
    ragged, nothing = torch.tensor([[0], [1], [2]]), torch.zeros(3, 1, dtype=torch.long)
    game.step(ragged)
    transition = game.step(nothing)
    assert_close(transition.reward, torch.zeros(3, 1), atol=1e-4, rtol=0)
