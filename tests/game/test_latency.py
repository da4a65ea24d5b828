"""Tables of times: known costs under a clock of our own, the cache, and what is decided by them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DEPTH, PATCHES, backbone
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tokenenv import UserError
from tokenenv.artefact import Unfit
from tokenenv.game import latency
from tokenenv.game.break_even import break_even
from tokenenv.game.latency import LatencyTable, TimeCost, measure_decisions, open_table
from tokenenv.game.policy import play
from tokenenv.game.rewards import Cooperative, Dora, KeepTarget, Turn
from tokenenv.game.timing import Curve, Nothing, time_rounds, token_grid
from tokenenv.reducers import Reducer
from tokenenv.vit.backbone import Backbone, Context
from tokenenv.vit.reduction import prune
from tokenenv.vit.tokens import Tokens

FULL = PATCHES + 1
ATTEND, FEED, FINISH, EMBED, DECIDE, READ = 3.0, 2.0, 0.5, 7.0, 1.0, 0.25
"""Seconds per token; of the embedding per image."""


class FakeClock:
    """A clock that stands still but for what is added to it."""

    now = 100.0

    def __call__(self) -> float:
        return self.now

    def __deepcopy__(self, memo: object) -> FakeClock:
        return self  # copies of a method advance the same clock


@dataclass(frozen=True)
class Last(Reducer):
    """Prunes the last ``count`` tokens; a decision takes :data:`DECIDE` for each token before."""

    blocks: tuple[int, ...]
    count: int = 4
    clock: Any = None
    reads = ("mean_keys",)

    def reduce(self, tokens: Tokens, context: Context, step: int) -> Tokens:
        if self.clock is not None:
            self.clock.now += DECIDE * float(tokens.counts().sum())
        keep = torch.arange(tokens.alive.shape[1]) < tokens.alive.sum(1, keepdim=True) - self.count
        keep[:, : tokens.prefix + 1] = True
        return prune(tokens, keep[:, tokens.prefix :])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """A clock by which each part takes its seconds per token, summed over the batch."""
    made = FakeClock()

    def takes(part: str, each: float) -> None:
        real = getattr(Backbone, part)

        def timed(self: Backbone, *args: Any, **kwargs: Any) -> Any:
            found = real(self, *args, **kwargs)
            if part == "embed":
                made.now += each * len(args[0])
                return found
            tokens = args[-1]
            made.now += each * float(tokens.counts().sum())
            if kwargs.get("mean_keys"):
                made.now += READ * float(tokens.counts().sum())
            return found

        monkeypatch.setattr(Backbone, part, timed)

    def through(
        self: Backbone, block: int, tokens: Tokens, *, proportional: bool = False
    ) -> Tokens:
        return self.feed(block, self.attend(block, tokens, proportional=proportional)[0])

    # Inside a whole block its halves are not called.
    monkeypatch.setattr(Backbone, "through", through)
    for part, each in (("embed", EMBED), ("attend", ATTEND), ("feed", FEED), ("finish", FINISH)):
        takes(part, each)
    return made


def by_hand(attended: Tensor, fed: Tensor) -> Tensor:
    """``(B,)`` seconds of images with ``(B, DEPTH)`` token counts."""
    halves = ATTEND * attended[:, :-1].sum(1) + FEED * fed[:, :-1].sum(1)
    return EMBED + halves + FINISH * attended[:, -1]


@pytest.mark.parametrize("batch", [1, 3])
def test_known_costs_give_known_predictions(clock: FakeClock, batch: int) -> None:
    table = LatencyTable.measure(backbone(), batch, budget=0, clock=clock)
    assert set(table.curves) == {"attend 0", "feed 0", "finish"}
    assert table.embed == pytest.approx(EMBED * batch)
    for name, each in (("attend 0", ATTEND), ("feed 0", FEED), ("finish", FINISH)):
        assert table.curves[name].tokens == tuple(token_grid(backbone()))
        wanted = [batch * each * n for n in token_grid(backbone())]
        assert table.curves[name].seconds == pytest.approx(wanted)
    attended = torch.tensor([[65, 65, 40, 33, 33, 7], [65, 50, 49, 48, 47, 46.0]])
    fed = torch.tensor([[65, 40, 33, 33, 7, 7], [50, 49, 48, 47, 46, 46.0]])
    got = table.backbone_seconds(backbone(), attended.unbind(1), fed.unbind(1))
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx(by_hand(attended, fed).tolist())
    full = torch.full((1, DEPTH), float(FULL))
    cost = TimeCost(backbone(), table, {})
    assert cost.dense() == pytest.approx(by_hand(full, full).item())
    with pytest.raises(UserError, match="66 tokens are more than the 65 that were timed"):
        table.backbone_seconds(backbone(), [full[0, :1] + 1] * DEPTH, [full[0, :1]] * DEPTH)


@pytest.mark.parametrize("batch", [1, 2])
def test_an_episode_costs_what_its_clock_says(clock: FakeClock, batch: int) -> None:
    method = Last((1, 3), clock=clock)
    table = LatencyTable.measure(backbone(), batch, budget=0, clock=clock)
    decisions = measure_decisions(backbone(), table, method, budget=0, clock=clock)
    assert set(decisions) == {0, 1}
    cost = TimeCost(backbone(), table, decisions)
    for step, before in ((0, FULL), (1, FULL - 4)):
        got = cost.decision_seconds(step, torch.tensor([before]))
        assert got.item() == pytest.approx((DECIDE + READ) * before)
    images = torch.randn(batch, *backbone().image_shape)
    start = clock.now
    with torch.no_grad():
        episode = play(backbone(), method, images, only_logits=True)
    took = clock.now - start
    assert cost.of(episode, method).sum().item() == pytest.approx(took)


def test_a_decision_that_changes_nothing_has_no_cost(clock: FakeClock) -> None:
    method = Last((1, DEPTH - 1), clock=clock)
    table = LatencyTable.measure(backbone(), 1, budget=0, clock=clock)
    decisions = measure_decisions(backbone(), table, method, budget=0, clock=clock)
    assert set(decisions) == {0}
    found = break_even(TimeCost(backbone(), table, decisions), method)
    assert found[1].decision_ms == 0 and found[1].least == 0


def test_from_how_many_tokens_on_a_decision_pays(clock: FakeClock) -> None:
    method = Last((1, 4), clock=clock)
    table = LatencyTable.measure(backbone(), 1, budget=0, clock=clock)
    decisions = measure_decisions(backbone(), table, method, budget=0, clock=clock)
    cost = TimeCost(backbone(), table, decisions)
    first, second = break_even(cost, method)
    assert (first.tokens, second.tokens) == (FULL, FULL - 4)
    # After the attention of block 1: its MLP, blocks 2 to 4, and the last part.
    each = FEED + (DEPTH - 3) * (ATTEND + FEED) + FINISH
    takes = (DECIDE + READ) * FULL
    assert first.decision_ms == pytest.approx(1e3 * takes)
    assert first.block_ms == pytest.approx(1e3 * each * FULL)
    assert first.least == math.ceil(takes / each)
    assert first.pays(first.least) and not first.pays(first.least - 1)
    assert second.least == math.ceil((DECIDE + READ) * (FULL - 4) / (FEED + FINISH))
    dear = {0: Curve((65.0,), (1e6,)), 1: Curve((61.0,), (1e6,))}
    assert break_even(TimeCost(backbone(), table, dear), method)[0].least is None


def test_savings_of_an_episode_add_up(clock: FakeClock) -> None:
    """What a reward is paid: dense time with all decisions, less that of the episode."""
    method = Last((1, 3), clock=clock)
    table = LatencyTable.measure(backbone(), 1, budget=0, clock=clock)
    decisions = measure_decisions(backbone(), table, method, budget=0, clock=clock)
    cost = TimeCost(backbone(), table, decisions)
    computation = cost.computation(method)
    with torch.no_grad():
        images = torch.randn(1, *backbone().image_shape)
        episode = play(backbone(), method, images, only_logits=True)
    saved = torch.zeros(1)
    for step in range(2):
        turn = Turn(step, 2, *([torch.ones(1, PATCHES)] * 2), (), None,
                    counts=episode.counts[: step + 2])  # fmt: skip
        saved = saved + computation.saved(turn)
    every = sum(cost.decision_seconds(s, torch.tensor([FULL])) for s in range(2))
    wanted = (cost.dense() + every - cost.of(episode, method)) / cost.dense()
    assert saved.item() == pytest.approx(float(wanted), rel=1e-5)
    # A token costs more between decisions 1 and 3 than after: two blocks of three and a bit.
    early = 2 * (ATTEND + FEED) + DECIDE + READ
    late = FEED + (ATTEND + FEED) + FINISH
    assert computation.weights == pytest.approx((2 * early / (early + late),
                                                 2 * late / (early + late)), rel=1e-2)  # fmt: skip


class Computation:
    """Known prices."""

    weights = (1.5, 0.5)

    def saved(self, turn: Turn) -> Tensor:
        return torch.full((1,), 0.2)


def test_rewards_take_the_price_of_computation() -> None:
    after = torch.ones(1, PATCHES, dtype=torch.bool)
    counts = tuple(torch.tensor([n]) for n in (64, 32))
    turn = Turn(0, 2, after, after, (after,), None, 0, DEPTH, counts, (torch.zeros(1),))
    dora = Dora(penalty=1.0).priced_by(Computation())
    assert dora(turn).item() == pytest.approx(25 * 0.2)
    assert Dora(penalty=1.0)(turn).item() == pytest.approx(25 * 0.5)
    assert dora.with_price(3.0).computation is dora.computation
    reward = Cooperative(beta=0.1)
    assert torch.equal(reward(turn), torch.full((1, PATCHES), -0.1))
    assert torch.equal(reward.priced_by(Computation())(turn), 1.5 * reward(turn))
    with pytest.raises(UserError, match="KeepTarget prices tokens, not time: take cost=macs"):
        KeepTarget().priced_by(Computation())


# Curves ------------------------------------------------------------------------------------------
@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=12))
def test_a_curve_hits_rising_points_and_never_falls(seconds: list[float]) -> None:
    counts = [float(3 * i + 1) for i in range(len(seconds))]
    curve = Curve.fit(list(zip(counts, sorted(seconds), strict=True)))
    assert curve(torch.tensor(counts)).tolist() == pytest.approx(sorted(seconds))
    wild = Curve.fit(list(zip(counts, seconds, strict=True)))
    between = wild(torch.linspace(-5, counts[-1] + 5, 101))
    assert (between.diff() >= -1e-12).all()
    assert min(seconds) - 1e-12 <= between[0] and between[-1] <= max(seconds) + 1e-12


def test_medians_leave_out_a_stall() -> None:
    curve = Curve.fit([(1, 1.0), (1, 1.0), (1, 9e3), (5, 3.0), (5, 3.0), (5, 3.0)])
    assert curve == Curve((1.0, 5.0), (1.0, 3.0))
    assert curve(torch.tensor([0, 1, 2, 5, 9])).tolist() == [1.0, 1.0, 1.5, 3.0, 3.0]


def test_a_pass_can_start_with_any_number_of_tokens() -> None:
    found = time_rounds(backbone(), Nothing(), 2, 0, FakeClock())
    counts = {events[0].tokens for events in found}
    assert counts == set(map(float, token_grid(backbone()))) and FULL in counts and 2 in counts
    for events in found:
        assert [e.part for e in events] == ["embed", *["attend", "feed"] * (DEPTH - 1), "finish"]
        assert {e.tokens for e in events} == {events[0].tokens}


# The cache ---------------------------------------------------------------------------------------
@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOKENENV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_table_is_measured_once(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = open_table(backbone(), 1, budget=0)
    assert capsys.readouterr().err == "timing the model's parts at batch size 1\n"
    assert open_table(backbone(), 1, budget=0) == made
    assert capsys.readouterr().err == ""
    open_table(backbone(), 2, budget=0)  # another batch size has a table of its own
    assert "batch size 2" in capsys.readouterr().err
    assert len(list(cache.iterdir())) == 2


def test_a_foreign_table_is_measured_again(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "describe_machine", lambda device: "another, 7 threads")
    open_table(backbone(), 1, budget=0)
    monkeypatch.undo()
    monkeypatch.setenv("TOKENENV_CACHE", str(cache))
    capsys.readouterr()
    made = open_table(backbone(), 1, budget=0)
    (line,) = capsys.readouterr().err.splitlines()
    assert "has machine 'another, 7 threads', not '" in line and "timing" in line
    assert open_table(backbone(), 1, budget=0) == made and made.key["machine"] != "another"


def damages(table: dict[str, Any]) -> list[str]:
    """Contents of files that are no table."""
    curve = table["curves"]["attend 0"]
    wrong: list[Any] = [
        {**table, "curves": {}},
        {**table, "embed": -1.0},
        {**table, "curves": {**table["curves"], "attend 0": [curve[0], curve[1][:-1]]}},
        {**table, "curves": {**table["curves"], "attend 0": [curve[0][::-1], curve[1]]}},
        {**table, "curves": {**table["curves"], "feed 0": [[1.0], ["x"]]}},
        {**table, "curves": {**table["curves"], "feed 0": [["a", 1.0], [1.0, 1.0]]}},
        {"key": 1},
        [],
    ]
    return ["", "{", *map(json.dumps, wrong)]


def test_a_damaged_table_is_measured_again(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = open_table(backbone(), 1, budget=0)
    (path,) = cache.iterdir()
    for content in damages(made.to_json()):
        path.write_text(content)
        capsys.readouterr()
        open_table(backbone(), 1, budget=0)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"cannot read '{path}'") and "timing the model's parts" in line
        assert LatencyTable.from_json(json.loads(path.read_text())).batch == 1


def test_times_of_a_run_come_back(clock: FakeClock) -> None:
    method = Last((1, 3), clock=clock)
    table = LatencyTable.measure(backbone(), 1, budget=0, clock=clock)
    decisions = measure_decisions(backbone(), table, method, budget=0, clock=clock)
    told = json.loads(json.dumps(latency.cost_to_json(TimeCost(backbone(), table, decisions))))
    back = latency.cost_from_json(backbone(), told)
    assert back.table == table and back.decisions == decisions
    told["table"]["key"]["shape"] = "other"
    with pytest.raises(Unfit, match="of another model"):
        latency.cost_from_json(backbone(), told)
