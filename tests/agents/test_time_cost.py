"""Training for predicted time: what a run is judged by, where it is kept, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenenv
from agents.systems.base import PolicyConfig
from agents.training import rl, train
from tokenenv import UserError
from tokenenv.game.cost import Cost
from tokenenv.game.latency import LatencyTable, TimeCost, table_key
from tokenenv.game.policy import Method
from tokenenv.game.timing import Curve
from tokenenv.vit.backbone import Backbone

pytestmark = pytest.mark.usefixtures("elsewhere", "one_thread")

SETTINGS: dict[str, Any] = {
    "images": 200, "updates": 10, "evaluate_every": 2, "batch": 64, "blocks": (0, 2, 4, 6),
    "cost": "time",
}  # fmt: skip


def line(slope: float, start: float = 0.0) -> Curve:
    return Curve((0.0, 100.0), (start, start + 100 * slope))


def known(backbone: Backbone, each: float = 0.5) -> TimeCost:
    """A table in which attention takes a second per token and decisions ``each`` per token."""
    curves = {"attend 0": line(1.0), "feed 0": line(0.1), "finish": line(0.1, 2.0)}
    table = LatencyTable(table_key(backbone, 1), 3.0, curves)
    return TimeCost(backbone, table, dict.fromkeys(range(4), line(each)))


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Times that no clock measured; the list has the batch sizes that were asked for."""
    asked: list[int] = []

    def made(backbone: Backbone, method: Method, batch: int) -> TimeCost:
        asked.append(batch)
        return known(backbone)

    monkeypatch.setattr(rl, "time_cost", made)
    return asked


def test_the_closed_loop_leads_to_the_wanted_time(steady: list[int]) -> None:
    """The saving reached is that in time, recomputed here from the tokens of each image."""
    target = 52.0
    run = train("dora", out="run", target_saving=target, cost_batch=8, **SETTINGS)
    assert steady == [8]
    report = run.report
    assert report["held_back"]["saving"] == pytest.approx(target, abs=3)
    assert report["predicted_for"]["batch"] == 1
    full = 65
    dense = 3 + 11 * full * 1.1 + 2 + 0.1 * full
    assert report["predicted_ms_dense"] == pytest.approx(1e3 * dense)
    left = [count + 1 for count in report["tokens"]]  # after each block, and the class token
    attended = [full, *left[:-1]]
    took = 3 + sum(attended[:-1]) + 0.1 * sum(left[:-1]) + 2 + 0.1 * attended[-1]
    took += 0.5 * sum(attended[block] for block in (0, 2, 4, 6))
    assert report["predicted_ms"] == pytest.approx(1e3 * took, rel=1e-3)
    macs = 100 * (1 - report["gmacs"] / report["gmacs_dense"])
    assert abs(macs - target) > 4, "time and multiply-adds should tell apart"


def test_a_resumed_run_goes_on_with_its_times(
    steady: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SETTINGS | {"updates": 2, "target_saving": 40.0, "calibrate": 1}
    train("dora", out="run", **settings)
    kept = json.loads(Path("run/latency.json").read_text())
    assert kept["table"]["embed"] == 3.0 and len(kept["decisions"]) == 4
    train("dora", out="run", resume=True, **settings)
    assert steady == [1]
    Path("run/latency.json").write_text('{"table": {}, "decisions": {}}')
    with pytest.raises(UserError, match=r"latency.json' .*: restore it, or start a new run"):
        train("dora", out="run", resume=True, **settings)


def test_a_saving_out_of_reach_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rl, "time_cost", lambda backbone, *_: known(backbone, each=20.0))
    with pytest.raises(UserError, match="target_saving=40 % of the time can't be reached"):
        train("dora", out="run", **SETTINGS | {"target_saving": 40.0})


def test_a_reward_without_a_price_of_time_is_refused(steady: list[int]) -> None:
    with pytest.raises(UserError, match="AlphaBeta prices tokens, not time"):
        train("rl4evit", out="run", images=60, cost="time", reward="alpha_beta", batch=8,
              target_saving=5.0, blocks=(1, 4))  # fmt: skip


def test_multiply_adds_stay_the_default() -> None:
    assert PolicyConfig().cost == "macs"
    run = train("dora", out="run", **SETTINGS | {"cost": "macs", "updates": 1, "calibrate": 1})
    assert "predicted_ms" not in run.report and not Path("run/latency.json").exists()
    backbone = tokenenv.load_backbone()
    counts = [torch.tensor([65])] * backbone.depth
    cost = Cost(backbone)
    assert cost.dense() == float(cost.backbone_macs(counts, counts))


def test_evaluation_tells_the_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TOKENENV_CACHE", str(tmp_path))
    monkeypatch.setattr(
        "tokenenv.api.latency.time_cost", lambda backbone, *_, **__: known(backbone)
    )
    found = tokenenv.evaluate("tome:r=4,blocks=0/2/4/6", limit=20, time_batch=4).to_dict()
    assert found["predicted_ms"] < 1.4 * found["predicted_ms_dense"]
    assert found["predicted_ms_dense"] == pytest.approx(1e3 * (3 + 11 * 65 * 1.1 + 2 + 6.5))
    with pytest.raises(UserError, match="batch=0"):
        tokenenv.evaluate("tome:r=4", limit=20, time_batch=0)


def test_a_table_says_which_decisions_pay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TOKENENV_CACHE", str(tmp_path))
    found = tokenenv.latency_table("tome:r=4,blocks=0/11", seconds=0)
    assert [each.block for each in found.decisions] == [0, 11]
    text = repr(found)
    assert "tome:r=4,blocks=0/11 on digits_vit, float32, batch size 1" in text
    assert "a decision in block 0 on 65 tokens takes" in text
    assert "the decision in block 11 is left out" in text
    assert 11 in found.paying_blocks(0) and 0 not in found.paying_blocks(0)
