"""Checkpoints that say what no training wrote: refused when the run is resumed, not later."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import backbone, same
from helpers import source as digits_source
from test_training import trainer
from timm.optim import create_optimizer_v2

from agents.finetune.ltm import LTMConfig
from agents.finetune.tuner import FineTuner
from agents.restoring import restore
from agents.systems.dora import DoraConfig
from agents.training.held_back import HeldBack
from agents.training.priced_game import PricedGame
from agents.training.trainer import CHECKPOINT
from tokenenv.artefact import FAULTS, Unfit
from tokenenv.data import Stream
from tokenenv.errors import UserError
from tokenenv.storage import flatten_state, read_tensors, unflatten_state, write_tensors

Change = Callable[[dict[str, Any]], Any]


def rewrite(path: Path, change: Change) -> None:
    """Write a checkpoint anew after a change of what it says."""
    tensors, saved = read_tensors(path)
    saved["state"] = unflatten_state(saved["state"], tensors)
    change(saved)
    tensors = {}
    saved["state"] = flatten_state("state", saved["state"], tensors)
    write_tensors(path, tensors, saved)


def optimiser(saved: dict[str, Any], whose: str = "actor") -> dict[str, Any]:
    found: dict[str, Any] = saved["state"]["learner"][f"{whose}_optimiser"]
    return found


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two updates of four."""
    out = tmp_path_factory.mktemp("half")
    short = trainer(out)
    short.updates = 2
    short.run()
    return out


def copied(half: Path, tmp_path: Path) -> Path:
    (tmp_path / CHECKPOINT).write_bytes((half / CHECKPOINT).read_bytes())
    return tmp_path / CHECKPOINT


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: optimiser(s)["state"][0].pop("exp_avg"), "state of parameter 0 is not its own"),
        (lambda s: optimiser(s)["state"][0].update(exp_avg=torch.zeros(3)), "state of parameter 0"),
        (lambda s: optimiser(s)["state"][0].update(step=3), "state of parameter 0"),
        (lambda s: optimiser(s, "critic")["state"].update({99: {}}), "state of parameter 99"),
        (lambda s: optimiser(s)["param_groups"][0].update(lr=1000.0), "settings are not the run's"),
        (lambda s: optimiser(s)["param_groups"][0].update(eps="none"), "settings are of another"),
        (lambda s: optimiser(s)["param_groups"][0].update(betas=[0.9]), "settings are of another"),
        (
            lambda s: optimiser(s)["param_groups"][0]["params"].reverse(),
            "parameters are of another",
        ),
        (lambda s: s["state"]["orders"][0].update(position=10**6), "'position' is 1000000 of 80"),
        (lambda s: s["state"]["orders"][0].update(position=-1), "'position' is -1, not a whole"),
        (lambda s: s["state"]["orders"][0].update(epoch=0.5), "'epoch' is 0.5, not a whole number"),
        (lambda s: s["state"]["best_state"].popitem(), "best policy's tensors are not of this"),
        (lambda s: s["history"].clear(), "'history' does not end with update 2"),
        (lambda s: s["history"].pop(), "'history' does not end with update 2|fine"),
        (lambda s: s["history"][1].pop("keep"), "no 'keep'"),
        (lambda s: s["history"][1].update(keep="all"), "a row of 'history' is"),
        (lambda s: s["history"][0].update(loss=None), "a row of 'history' is"),
        (lambda s: s.update(done=3), "'history' does not end with update 3"),
        (lambda s: s.update(done=1), "'update' is 2, not a whole number from 0 to 1"),
    ],
)
def test_what_no_training_wrote(change: Change, words: str, half: Path, tmp_path: Path) -> None:
    rewrite(copied(half, tmp_path), change)
    again = trainer(tmp_path)
    if words.endswith("|fine"):  # a judgement that is missing is no fault
        again.resume()
        return
    with pytest.raises(UserError, match=words) as error:
        again.resume()
    assert "\n" not in str(error.value) and "another --out" in str(error.value)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "lion", "adafactor", "nadam", "rmsprop"])
def test_an_optimiser_takes_back_its_own_state(name: str) -> None:
    def made() -> tuple[torch.optim.Optimizer, list[torch.nn.Parameter]]:
        own = [torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(4))]
        return create_optimizer_v2([{"params": own}], name, lr=0.1), own

    first, parameters = made()
    second, others = made()
    for _ in range(2):
        parameters[0].grad = torch.full((3, 2), 0.5)  # the other has none, and no state
        first.step()
    restore(second, copy.deepcopy(first.state_dict()))
    assert same(second.state_dict(), first.state_dict())
    others[0].data.copy_(parameters[0])
    for optimizer, own in ((first, parameters), (second, others)):
        own[0].grad = torch.full((3, 2), -0.2)
        optimizer.step()
    assert torch.equal(parameters[0], others[0])
    with pytest.raises(Unfit, match="parameter 5"):
        restore(second, first.state_dict() | {"state": {5: {}}})


@pytest.mark.parametrize("price", [None, "5", True, -1.0, 0.0, 1e300])
def test_a_price_that_no_loop_gave(price: Any) -> None:
    config = DoraConfig(batch=8, hidden=(8,))
    game = config.game(backbone(), digits_source())
    priced = PricedGame(game, config, HeldBack(backbone(), digits_source()))
    state = priced.state_dict()
    with pytest.raises(FAULTS):
        priced.load_state_dict(state | {"price": price})
    priced.load_state_dict(state | {"price": 7.0})
    assert priced.state_dict() == state | {"price": 7.0}


def test_statistics_of_another_model() -> None:
    config = LTMConfig(updates=4, batch=8, ratio=0.5, evaluate_every=2, eta=5.0)
    student = config.student(backbone(), "digits_vit")
    learner = FineTuner(
        student, backbone(), Stream(digits_source(), 8, 0), config, 0, clean=digits_source()
    )
    for _ in range(3):
        learner.update()
    state = learner.state_dict()
    centroids, log_q = state["remembered"]["levels"][0]
    for levels in ([[centroids, log_q]], [[centroids[:, 1:], log_q]] * 3, [[log_q]] * 3, [5]):
        with pytest.raises(FAULTS):
            learner.load_state_dict(state | {"remembered": {"levels": levels}})
    for done in (-1, 99, "1", None):
        with pytest.raises(Unfit, match="updates are done"):
            learner.load_state_dict(state | {"done": done})
    learner.load_state_dict(state)
    assert learner.done == 3


def test_weights_that_are_not_finite_are_not_kept(tmp_path: Path) -> None:
    broken = trainer(tmp_path)
    update = broken.learner.update

    def overflow() -> dict[str, float]:
        found = update()
        with torch.no_grad():
            broken.learner.policy.skip.weight[0, 0] = torch.nan
        return found

    broken.learner.update = overflow  # type: ignore[method-assign]
    broken.evaluate_every = 1  # or the next update's losses would tell
    with pytest.raises(UserError, match=r"diverged \('skip.weight' is not finite after 1 updates"):
        broken.run()
    tensors, saved = read_tensors(tmp_path / CHECKPOINT)
    assert saved["done"] == 0 and all(t.isfinite().all() for t in tensors.values())
