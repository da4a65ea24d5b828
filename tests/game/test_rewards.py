"""RL4EViT's rewards: who is paid what, and where the balance lies."""

import math

import pytest
import torch
from torch.testing import assert_close

from tokenenv.errors import UserError
from tokenenv.game.rewards import AlphaBeta, ClosedLoop, Cooperative, KeepTarget, Outcome, Turn


def outcome(correct: list[bool], fidelity_gap: float = 0.0) -> Outcome:
    labels = torch.zeros(len(correct), dtype=torch.long)
    logits = torch.tensor([[2.0, 0.0, 0.0] if c else [0.0, 2.0, 0.0] for c in correct])
    return Outcome(logits, labels, logits + torch.tensor([fidelity_gap, 0.0, 0.0]))


def turn(after: list[list[int]], *, step: int = 2, end: Outcome | None = None, before=None) -> Turn:
    now = torch.tensor(after).bool()
    was = torch.ones_like(now) if before is None else torch.tensor(before).bool()
    return Turn(step, 3, was, now, (was,) * step + (now,), end)


def test_alpha_beta_by_hand() -> None:
    reward = AlphaBeta(alpha=12.0, beta=0.1, class_reward="final")
    got = reward(turn([[1, 1, 0, 1], [1, 0, 0, 0]], end=outcome([True, False])))
    assert_close(got, torch.tensor([[3.9, 3.9, 0, 3.9], [-0.1, 0, 0, 0]]))
    # Before the end only the price is paid.
    assert_close(reward(turn([[1, 0, 1, 1]], step=0)), torch.tensor([[-0.1, 0, -0.1, -0.1]]))


def test_class_reward_for_each_decision_adds_up_the_history() -> None:
    history = tuple(
        torch.tensor([row]).bool() for row in ([1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0])
    )
    end = Turn(2, 3, history[1], history[2], history, outcome([True]))
    got = AlphaBeta(alpha=8.0, beta=0.0, class_reward="each")(end)
    assert_close(got, torch.tensor([[2.0 + 4.0 + 8.0, 2.0 + 4.0, 2.0, 2.0]]))


def test_the_last_decision_has_more_at_stake_than_its_own_share() -> None:
    """papers.md section 2: all shares are paid at the end, 2.2 times the last decision's own."""
    tokens = torch.arange(1000)
    history = tuple((tokens < n)[None] for n in (700, 490, 343))
    end = Turn(2, 3, history[1], history[2], history, outcome([True]))
    own, each = (AlphaBeta(24.0, 0.0, when)(end)[0, 0] for when in ("final", "each"))
    assert each / own == pytest.approx(2.19, abs=0.005)
    before = Turn(1, 3, history[0], history[1], history[:2], None)
    assert AlphaBeta(24.0, 0.0, "each")(before).abs().sum() == 0


def test_nobody_alive_is_finite() -> None:
    for reward in (AlphaBeta(), KeepTarget(), Cooperative()):
        got = reward(turn([[0, 0, 0]], end=outcome([True])))
        assert got.isfinite().all()


@pytest.mark.parametrize("class_reward", ["each", "final"])
def test_equilibrium_of_the_alpha_beta_game(class_reward: str) -> None:
    """papers.md section 6: alive* = p alpha / beta on a bandit with a constant p of being right.

    One decision, 200 agents, each keeps with the same probability. Where fewer are alive than
    the balance, staying pays; where more are, leaving does.
    """
    agents, alpha, beta, p = 200, 24.0, 0.2, 0.7
    reward = AlphaBeta(alpha, beta, class_reward)
    balance = p * alpha / beta
    generator = torch.Generator().manual_seed(0)
    right = torch.rand(4000, generator=generator) < p
    for alive, sign in ((balance - 20, 1), (balance + 20, -1)):
        after = torch.zeros(4000, agents, dtype=torch.bool)
        after[:, : round(alive)] = True
        end = Turn(0, 1, torch.ones_like(after), after, (after,), outcome(right.tolist()))
        staying = reward(end)[:, 0].mean()
        leaving = reward(end)[:, -1].mean()
        assert leaving == 0
        assert torch.sign(staying) == sign
    # Gradient play on the shared probability ends at the balance.
    keep = torch.tensor(0.9)
    for _ in range(3000):
        advantage = alpha * p / (keep * agents) - beta
        keep = (keep + 0.01 * advantage).clamp(0.01, 1)
    assert abs(keep.item() * agents - balance) < 0.5


def test_keep_target_by_hand() -> None:
    reward = KeepTarget(targets=(0.7, 0.49, 0.5), alpha=0.0)
    too_many = reward(turn([[1, 1, 1, 0]]))
    assert_close(too_many, torch.tensor([[-1, -1, -1, 0]]) * torch.tensor(0.25).exp())
    # Too few: those that left now pay, those dead before cannot be blamed.
    too_few = reward(turn([[1, 0, 0, 0]], before=[[1, 1, 1, 0]]))
    assert_close(too_few, torch.tensor([[0, -1, -1, 0]]) * torch.tensor(0.25).exp())


def test_cooperative_pays_the_dead_too() -> None:
    reward = Cooperative(alpha=2.0, beta=0.1)
    same = reward(turn([[1, 0]], end=outcome([True])))
    assert_close(same, torch.tensor([[1.9, 2.0]]))
    other = reward(turn([[1, 0]], end=outcome([True], fidelity_gap=1.0)))
    assert (other < same).all()
    assert_close(other[0, 1] - other[0, 0], torch.tensor(0.1))


def test_cooperative_with_a_shared_price_pays_all_alike() -> None:
    own, shared = Cooperative(beta=0.1), Cooperative(beta=0.1, shared=True)
    now = turn([[1, 0, 0, 1], [1, 1, 1, 1]])
    assert_close(shared(now), torch.tensor([[-0.05], [-0.1]]).expand(2, 4))
    end = turn([[1, 0, 0, 1], [1, 1, 1, 1]], end=outcome([True, False], fidelity_gap=0.5))
    assert_close(shared(end), own(end).mean(1, keepdim=True).expand(2, 4))


def test_fidelity_is_exp_of_minus_kl() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, native = torch.randn(2, 5, 7, generator=generator)
    got = Outcome(logits, torch.zeros(5), native).fidelity
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=native),
        torch.distributions.Categorical(logits=logits),
    )
    assert_close(got, (-expected).exp())


def test_the_closed_loop_settles_where_the_target_is() -> None:
    """A model that saves 10 percent more for each factor e of price."""
    for start in (1e-5, 1e-1):
        loop = ClosedLoop(price=start, target=30.0)
        for _ in range(100):
            loop.follow(100 + 10 * math.log(loop.price))
        assert loop.price == pytest.approx(math.exp(-7), rel=0.01)
    assert ClosedLoop(1.0, 30.0).follow(30.0) == 1.0
    assert ClosedLoop(1.0, 30.0).follow(90.0) == pytest.approx(math.exp(-0.2))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: KeepTarget(targets=(0.7, 0.0, 0.3)), r"keep ratio 0 is outside \(0, 1\]"),
        (lambda: KeepTarget(targets=(1.5,)), "keep ratio 1.5"),
        (lambda: AlphaBeta(class_reward="always"), "class_reward='always'"),
        (lambda: KeepTarget(targets=(0.5,))(turn([[1]])), "1 targets for 3 decisions"),
    ],
)
def test_bad_parameters(build, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build()
