"""DORA's rewards: increments that telescope, shadows, and what the price follows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import source as digits_source
from torch import Tensor
from torch.testing import assert_close

from agents.systems.dora import DoraConfig, DoraPruneConfig
from agents.training.judgement import Judgement
from tokenenv import UserError, build_game, load_backbone
from tokenenv.game import Game
from tokenenv.game.episode import Episode
from tokenenv.game.rewards import Dora, Outcome, PenaltyLoop, Turn
from tokenenv.vit.backbone import Backbone

BLOCKS = (1, 4, 7, 11)
PENALTY = 300.0
KEEP = {"pairs": 0, "tokens": 1, "count": 0}
GAMES = pytest.mark.parametrize(
    ("rules", "action"),
    [("layer_merge", "pairs"), ("layer_merge", "count"), ("layer_prune", "tokens"),
     ("layer_prune", "count")],
)  # fmt: skip
EXECUTION = pytest.mark.parametrize("execution", ["masked", "padded"])


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone()


def dora_game(backbone: Backbone, rules: str, action: str, **kwargs: Any) -> Game:
    options = {"blocks": BLOCKS, "batch_size": 6, "reward": Dora(penalty=PENALTY)} | kwargs
    return build_game(rules=rules, action=action, model=backbone, data=digits_source(), **options)  # type: ignore[arg-type]


class Played:
    """A game played to its end with random actions, and what one can see of it from outside."""

    def __init__(self, game: Game, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.game, self.rewards, self.actions = game, [], []
        self.left, self.shadows, self.summaries = [], [], []
        seen = game.reset()
        self.left.append([game.backbone.patches] * game.batch_size)
        rows = torch.arange(game.batch_size).flip(0)
        while seen is not None:
            shape = (game.batch_size, game.agents)
            if game.actions == 2:
                action = (torch.rand(shape, generator=generator) < 0.7).long()
            else:
                action = torch.randint(0, min(game.actions, 9), shape, generator=generator)
            # One image is left alone for a while.
            if len(self.actions) < 3:
                action[0] = KEEP[game.rules.action]
            self.actions.append(action)
            transition = game.step(action)
            self.rewards.append(transition.reward)
            episode = game.episode
            names = [{int(s) for s in row if s >= 0} for row in episode.tokens.source]
            self.left.append([len(name) for name in names])
            with torch.no_grad():
                self.shadows.append(episode.finish(rows).flip(0))
            self.summaries.append(episode.tokens.x[:, 0].clone())
            seen = transition.observation
        assert transition.reward.shape == (game.batch_size, 1)
        self.outcome = transition.outcome
        self.reward = torch.cat(self.rewards, 1)  # (B, T)

    @property
    def compression(self) -> Tensor:
        """``(B, T)`` share of the token-layers that each decision saved, by hand."""
        depth, start = self.game.backbone.depth, self.game.backbone.patches
        return torch.tensor(
            [
                [
                    (self.left[t][b] - self.left[t + 1][b]) * (depth - block) / (depth * start)
                    for t, block in enumerate(self.game.rules.blocks)
                ]
                for b in range(self.game.batch_size)
            ]
        )

    def divergence(self, logits: Tensor, tau: float = 3.0) -> Tensor:
        native = torch.distributions.Categorical(logits=self.outcome.dense / tau)
        other = torch.distributions.Categorical(logits=logits / tau)
        return tau**2 * torch.distributions.kl_divergence(native, other)

    @torch.no_grad()
    def replay(self, decisions: int) -> Tensor:
        """Logits of a fresh episode with the first decisions only."""
        game = self.game
        rules = game.rules
        episode = Episode(game.backbone, rules, game.images, execution=game.execution)
        while not episode.done:
            action = self.actions[episode.step]
            if episode.step >= decisions:
                action = torch.full_like(action, KEEP[rules.action])
            episode.act(rules.from_roster(episode.tokens, action))
        return episode.logits


# Rewards -----------------------------------------------------------------------------------------
@GAMES
@EXECUTION
def test_the_reward_telescopes(backbone: Backbone, rules: str, action: str, execution: str) -> None:
    """papers.md section 6: the sum of all rewards is 25 C - a D of the final logits."""
    played = Played(dora_game(backbone, rules, action, execution=execution))
    final = played.divergence(played.outcome.logits)
    expected = 25 * played.compression.sum(1) - PENALTY * final
    assert_close(played.reward.sum(1), expected, atol=2e-3, rtol=1e-4)
    assert PENALTY * final.max() > 0.5 and played.compression.sum(1).max() > 0.05


@GAMES
@EXECUTION
def test_shadows_are_replays_and_rewards_their_signed_increments(
    backbone: Backbone, rules: str, action: str, execution: str
) -> None:
    played = Played(dora_game(backbone, rules, action, execution=execution))
    before = torch.zeros(6)
    for t in range(len(BLOCKS)):
        logits = played.replay(t + 1)
        assert_close(played.shadows[t], logits, atol=1e-4, rtol=0)
        damage = played.divergence(logits)
        expected = 25 * played.compression[:, t] - PENALTY * (damage - before)
        assert_close(played.reward[:, t], expected, atol=3e-3, rtol=1e-4)
        before = damage
    assert_close(played.replay(len(BLOCKS)), played.outcome.logits, atol=1e-4, rtol=0)
    assert_close(played.replay(0), played.outcome.dense, atol=1e-4, rtol=0)
    # Who was left alone neither gains nor loses.
    assert_close(played.reward[0, :3], torch.zeros(3), atol=1e-3, rtol=0)


def test_less_damage_than_before_is_paid_back() -> None:
    """Damage 0.1, 0.5, 0.2 with nothing removed: -a 0.1, -a 0.4, +a 0.3."""
    damage = tuple(torch.tensor([d]) for d in (0.1, 0.5, 0.2))
    alive = torch.ones(1, 1, dtype=torch.bool)
    counts = (torch.tensor([10]),) * 4
    got = []
    for step in range(3):
        end = Outcome(*(torch.zeros(1, n) for n in (3, 1, 3))) if step == 2 else None
        turn = Turn(step, 3, alive, alive, (alive,), end, step, 3, counts[: step + 2],
                    damage[: step + 1])  # fmt: skip
        got.append(Dora(penalty=10.0)(turn).item())
    assert got == pytest.approx([-1.0, -4.0, 3.0])


@EXECUTION
def test_paid_at_the_end_only_the_sum_is_the_same(backbone: Backbone, execution: str) -> None:
    dense, terminal = (
        Played(
            dora_game(
                backbone, "layer_prune", "tokens", execution=execution,
                reward=Dora(penalty=PENALTY, terminal=terminal),
            )
        )
        for terminal in (False, True)
    )  # fmt: skip
    assert_close(dense.reward.sum(1), terminal.reward.sum(1), atol=1e-3, rtol=1e-5)
    assert_close(terminal.reward[:, :-1], 25 * terminal.compression[:, :-1])
    assert (dense.reward[:, :-1] - terminal.reward[:, :-1]).abs().max() > 0.1


@EXECUTION
def test_the_end_is_paid_for_though_nothing_leaves_at_last(
    backbone: Backbone, execution: str
) -> None:
    sums = []
    for terminal in (False, True):
        game = dora_game(
            backbone, "layer_prune", "tokens", execution=execution,
            reward=Dora(penalty=PENALTY, terminal=terminal),
        )  # fmt: skip
        game.reset()
        total = 0.0
        for step in range(game.steps):
            keep = torch.ones(game.batch_size, game.agents, dtype=torch.long)
            keep[:, :20] = step > 0
            total = total + game.step(keep).reward
        sums.append(total)
    assert_close(*sums, atol=1e-3, rtol=1e-5)


def test_bent_damage_telescopes_too(backbone: Backbone) -> None:
    reward = Dora(efficiency=10.0, penalty=7.0, tau=2.0, bend=0.1)
    played = Played(dora_game(backbone, "layer_merge", "pairs", reward=reward))
    final = played.divergence(played.outcome.logits, tau=2.0)
    expected = 10 * played.compression.sum(1) - 7 * (final + final**2 / 0.1)
    assert_close(played.reward.sum(1), expected, atol=5e-3, rtol=1e-4)


@GAMES
@EXECUTION
def test_drift_by_hand(backbone: Backbone, rules: str, action: str, execution: str) -> None:
    """``1 - cos`` of the class tokens when the next decision is due, exp(10 d) - 1 of it."""
    reward = Dora(penalty=4.0, damage="drift")
    played = Played(dora_game(backbone, rules, action, execution=execution, reward=reward))
    model, dense = backbone.model, []
    with torch.no_grad():
        x = model.norm_pre(model._pos_embed(model.patch_embed(played.game.images)))
        for index, block in enumerate(model.blocks):
            x = x + block.ls1(block.attn(block.norm1(x)))
            if index in BLOCKS[1:]:
                dense.append(x[:, 0])
            x = x + block.ls2(block.mlp(block.norm2(x)))
        dense.append(x[:, 0])
    before, seen = torch.zeros(6), []
    for t in range(len(BLOCKS)):
        one, other = played.summaries[t].double(), dense[t].double()
        cosine = (one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1))
        damage = (10 * (1 - cosine)).exp() - 1
        expected = 25 * played.compression[:, t] - 4 * (damage - before)
        if t == len(BLOCKS) - 1:
            expected = expected - 4 * played.divergence(played.outcome.logits)
        assert_close(played.reward[:, t].double(), expected, atol=2e-3, rtol=1e-3)
        before = damage
        seen.append(damage.max())
    assert max(seen) > 0.05


def test_the_critic_is_told_the_course_of_the_episode(backbone: Backbone) -> None:
    game = dora_game(backbone, "layer_prune", "tokens", privileged=True)
    seen, generator, turns = game.reset(), torch.Generator().manual_seed(0), 0
    totals, damages = torch.zeros(6), torch.zeros(6)
    while seen is not None:
        state = seen.state
        assert state.shape[1] == game.state_dim
        assert_close(state[:, -13:-3], game.dense)  # ten classes
        assert_close(state[:, -3], totals)
        assert_close(state[:, -2], damages)
        assert (state[:, -1] == PENALTY / 300).all()
        assert seen.tokens.shape == (6, 65, backbone.dim)
        zero = (seen.tokens == 0).all(2)
        assert torch.equal(65 - zero.sum(1), 1 + game.counts[-1])
        action = (torch.rand(6, 64, generator=generator) < 0.8).long()
        transition = game.step(action)
        block = BLOCKS[turns]
        turns += 1
        saved = (game.counts[-2] - game.counts[-1]) * (12 - block) / (12 * 64)
        totals = totals + saved
        damages = damages + (25 * saved - transition.reward[:, 0]) / PENALTY
        seen = transition.observation
    assert turns == len(BLOCKS) and totals.min() > 0.1


@pytest.mark.parametrize(
    ("penalty", "target", "drop", "expected"),
    [
        (30.0, 0.01, 0.01, 30.0),  # on target
        (30.0, 0.01, 0.02, 35.0),  # a point too much
        (30.0, 0.01, 0.015, 32.5),
        (30.0, 0.01, 0.0, 25.0),
        (30.0, 0.01, 0.5, 40.0),  # two points at most, up
        (30.0, 0.01, -0.9, 20.0),  # and down
        (3.0, 0.01, 0.0, 0.0),  # never below nothing
        (298.0, 0.01, 0.03, 300.0),  # never above 300
    ],
)
def test_the_penalty_loop_by_hand(
    penalty: float, target: float, drop: float, expected: float
) -> None:
    loop = PenaltyLoop(penalty, target)
    assert loop.follow(drop) == pytest.approx(expected)
    assert loop.penalty == pytest.approx(expected)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: PenaltyLoop(30.0, 1.5), r"target drop 1.5 is outside \[0, 1\]"),
        (lambda: PenaltyLoop(30.0, -0.1), "target drop -0.1"),
        (lambda: PenaltyLoop(30.0, math.nan), "target drop nan"),
        (lambda: Dora(damage="none"), "damage='none': choose from drift, divergence"),
        (lambda: Dora(tau=0), "tau=0 must be greater than 0"),
        (lambda: Dora(kappa=-1), "kappa=-1 must be greater than 0"),
        (lambda: Dora(penalty=-5), "penalty=-5 must be a finite number from 0"),
        (lambda: Dora(efficiency=math.nan), "efficiency=nan must be a finite number from 0"),
        (lambda: Dora(bend=-1), "bend=-1 must be a finite number from 0"),
    ],
)
def test_bad_parameters(build: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_what_the_price_follows() -> None:
    drop = DoraPruneConfig(target_drop=0.01)
    assert drop.next_price(30.0, Judgement(20.0, 0.5, 2.0)) == pytest.approx(35.0)  # in points
    saving = DoraPruneConfig(target_saving=30.0)
    # Too little is saved: damage gets cheaper, and the other way round.
    assert saving.next_price(30.0, Judgement(10.0, 0.5, 2.0)) == pytest.approx(30 / math.exp(0.2))
    assert saving.next_price(30.0, Judgement(31.0, 0.5, 2.0)) == pytest.approx(30 * math.exp(0.04))
    assert DoraConfig(closed_loop=False).next_price(30.0, Judgement(1.0, 0.5, 2.0)) == 30.0


@pytest.mark.parametrize(
    ("mine", "theirs", "wins"),
    [
        ((20.0, 0.9), (10.0, 0.5), True),  # both within a point: who saves more
        ((10.0, 0.5), (20.0, 0.9), False),
        ((10.0, 0.9), (40.0, 1.5), True),  # within it, the other not
        ((40.0, 1.5), (10.0, 0.9), False),
        ((10.0, 1.2), (40.0, 1.5), True),  # neither: who is nearer
        ((20.0, 0.9), (20.0, 0.1), False),  # a tie: the first stays
    ],
)
def test_which_of_two_is_better_with_a_target_drop(
    mine: tuple[float, float], theirs: tuple[float, float], wins: bool
) -> None:
    one, other = (Judgement(saving, 0.0, drop) for saving, drop in (mine, theirs))
    assert one.beats(other, 30.0, 0.01) is wins
