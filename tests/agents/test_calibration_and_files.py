"""Calibration, which policy is better, and files that training writes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from helpers import same

from agents.policies.actor import ActorPolicy, Widths
from agents.training.judgement import Judgement, calibrate
from agents.training.trainer import check_same
from tokenenv.errors import UserError
from tokenenv.game.rules import TokenPrune
from tokenenv.storage import (
    flatten_state,
    read_tensors,
    unflatten_state,
    write_bytes,
    write_json,
    write_tensors,
)


def test_a_number_and_a_list_of_it_are_one_setting() -> None:
    out = Path("run")
    check_same({"initial_budget": 12.0}, {"initial_budget": [12.0]}, out)
    check_same({"initial_budget": [12.0]}, {"initial_budget": 12.0}, out)
    for now in ([12.0, 12.0], [], [11.0], 11.0, None):
        with pytest.raises(UserError, match=r"with initial_budget=12.0; use the same"):
            check_same({"initial_budget": 12.0}, {"initial_budget": now}, out)
    with pytest.raises(UserError, match=r"'run' with blocks=3/5: .* with blocks=0/2/4;"):
        check_same({"blocks": [0, 2, 4]}, {"blocks": [3, 5]}, out)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"cannot write.*No space left.*choose another"):
            write_bytes(path, b"new and longer")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"a": [1, 2.5, None]})
    assert json.loads(path.read_text()) == {"a": [1, 2.5, None]}
    with pytest.raises(TypeError):
        write_json(path, object())
    assert json.loads(path.read_text()) == {"a": [1, 2.5, None]}
    with pytest.raises(UserError, match="cannot write"):
        write_json(path / "below-a-file.json", {})


def test_what_was_read_does_not_change_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    write_tensors(path, {"a": torch.ones(4096)}, {"b": 1})
    tensors, config = read_tensors(path)
    path.write_bytes(b"\x07" * path.stat().st_size)
    assert torch.equal(tensors["a"], torch.ones(4096))
    assert config == {"b": 1}


def test_any_nested_state_survives_flattening() -> None:
    state = {
        "tensors": [torch.arange(3), torch.zeros(()), torch.rand(2, 2, dtype=torch.float64)],
        "plain": {"a": 1, "b": 2.5, "c": None, "d": True, "e": "text", "f": [], "g": {}},
        3: {"numbers as": "keys"},
        "x.y": torch.ones(1),
        "x": {"y": torch.zeros(1)},
    }
    tensors: dict[str, torch.Tensor] = {}
    skeleton = json.loads(json.dumps(flatten_state("s", state, tensors)))
    assert same(unflatten_state(skeleton, tensors), state)
    with pytest.raises(TypeError, match=r"cannot store a object at s\.bad"):
        flatten_state("s", {"bad": object()}, {})


def test_an_optimiser_goes_on_from_its_flattened_state() -> None:
    def optimiser(parameter: torch.nn.Parameter) -> torch.optim.Optimizer:
        return torch.optim.Adam([parameter], lr=0.1, betas=(0.8, 0.9), weight_decay=0.1)

    def descend(parameter: torch.nn.Parameter, adam: torch.optim.Optimizer) -> None:
        for factor in (1.0, 2.0, 3.0):
            adam.zero_grad()
            (parameter**2 * factor).sum().backward()
            adam.step()

    one = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    first = optimiser(one)
    descend(one, first)
    tensors: dict[str, torch.Tensor] = {}
    skeleton = json.loads(json.dumps(flatten_state("o", first.state_dict(), tensors)))
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # as from a file
    other = torch.nn.Parameter(one.detach().clone())
    second = optimiser(other)
    second.load_state_dict(unflatten_state(skeleton, tensors))
    descend(one, first)
    descend(other, second)
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("mine", "theirs", "wins"),
    [
        ((30.0, 0.5), (40.0, 0.6), True),  # both save the target: the loss decides
        ((40.0, 0.6), (30.0, 0.5), False),
        ((29.5, 0.5), (30.0, 0.6), True),  # a point less is as good
        ((28.5, 0.1), (30.0, 0.6), False),  # more than that is not
        ((30.0, 9.0), (28.5, 0.1), True),
        ((20.0, 9.0), (10.0, 0.1), True),  # of two that save too little, who saves more
        ((30.0, 0.5), (35.0, 0.5), False),  # a tie: the first stays
    ],
)
def test_which_of_two_is_better(
    mine: tuple[float, float], theirs: tuple[float, float], wins: bool
) -> None:
    assert Judgement(*mine, 0.0).beats(Judgement(*theirs, 0.0), target_saving=30.0) is wins


def test_the_first_is_better_than_none() -> None:
    assert Judgement(-99.0, 99.0, 99.0).beats(None, 30.0)


def some_policy() -> ActorPolicy:
    return ActorPolicy(TokenPrune(), Widths(4, 0, 4), hidden=(4,))


@pytest.mark.parametrize("target", [5.0, 31.0, 50.0, 77.0, 95.0])
def test_calibration_saves_the_target_and_hardly_more(target: float) -> None:
    policy = some_policy()
    tried = []

    def judge(policy: ActorPolicy) -> Judgement:
        tried.append(policy.threshold)
        return Judgement(100 * policy.threshold, 0.0, 0.0)

    found = calibrate(policy, judge, target, steps=10)
    assert tried[0] == 0.5
    assert len(tried) == 10
    assert found.saving == 100 * policy.threshold
    assert policy.threshold == min(t for t in tried if 100 * t >= target)
    assert target <= found.saving < target + 1


def test_calibration_out_of_reach_saves_what_it_can() -> None:
    policy = some_policy()
    found = calibrate(policy, lambda p: Judgement(p.threshold, 0.0, 0.0), 30.0, steps=5)
    assert policy.threshold > 0.97
    assert found.saving == policy.threshold
