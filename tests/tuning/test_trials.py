"""Trials on the choosing images, the fit of their losses, and who survives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import DEPTH, backbone, source

from agents.policies.words import parse_policy
from tokenenv.measure.candidate import MethodCandidate
from tokenenv.measure.evaluation import evaluate
from tokenenv.tuning.proposals import fitting, words_for
from tokenenv.tuning.trials import Reference, Trial, expected_losses, front_first


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(backbone(), source(), labels=True, seed=3)


def candidate(word: str) -> MethodCandidate:
    return MethodCandidate(word, parse_policy(word, DEPTH), backbone())


def test_a_trial_counts_what_evaluation_counts(reference: Reference) -> None:
    tried = candidate("evit:keep=0.4,blocks=0/1")
    found = reference.extend(Trial("evit"), tried, len(reference), None)
    result = evaluate(backbone(), tried.method, source())
    assert found.images == len(result.labels)
    assert found.pairs.lost == pytest.approx(result.drop)
    assert found.agreement == pytest.approx(result.report()["agreement"])
    assert found.divergence > 0


def test_a_trial_goes_on_where_it_stopped(reference: Reference) -> None:
    tried = candidate("tome:r=6")
    at_once = reference.extend(Trial("tome"), tried, 12, None)
    part = reference.extend(Trial("tome"), tried, 5, None)
    assert part.images == 5
    in_two = reference.extend(part, tried, 12, None)
    assert replace(in_two, divergence=0) == replace(at_once, divergence=0)
    assert in_two.divergence == pytest.approx(at_once.divergence, rel=1e-3, abs=1e-6)


def test_nobody_decides_nothing_is_lost(reference: Reference) -> None:
    found = reference.extend(Trial("keep-all"), candidate("keep-all"), len(reference), None)
    assert found.divergence == pytest.approx(0, abs=1e-6)
    assert found.agree == found.images and found.pairs.lost == 0


def test_without_labels_every_change_is_a_loss() -> None:
    reference = Reference(backbone(), source(), labels=False, seed=3)
    assert reference.top1 == 100.0
    word = "random:keep=0.2,blocks=0/1"
    found = reference.extend(Trial(word), candidate(word), len(reference), None)
    assert found.wins == 0 and found.losses == found.images - found.agree > 0


def trial(what: str, divergence: float, losses: int, speed: float = 1.5) -> Trial:
    return Trial(what, 400, divergence, 380, 4, 4 + losses, speed, speed)


def test_losses_are_fitted_over_the_divergence() -> None:
    """By hand: pooling adjacent violators of -2, 4, 2, 6, 5 images, none below zero."""
    tried = [trial("e", 0.5, 5), trial("a", 0.1, -2), trial("d", 0.4, 6), trial("b", 0.2, 4),
             trial("c", 0.3, 2)]  # fmt: skip
    found = dict(zip("eadbc", expected_losses(tried), strict=True))
    by_hand = {"a": 0.0, "b": 3.0, "c": 3.0, "d": 5.5, "e": 5.5}
    assert {k: v * 4 for k, v in found.items()} == pytest.approx(by_hand)
    assert expected_losses([]) == []


def test_layers_of_the_front() -> None:
    tried = [trial("slow", 0.05, 0, 1.1), trial("worse", 0.2, 0, 1.2), trial("fast", 0.3, 0, 2.0),
             trial("good", 0.1, 0, 1.5), trial("worst", 0.4, 0, 1.4)]  # fmt: skip
    assert [t.what for t in front_first(tried)] == ["fast", "good", "slow", "worst", "worse"]


def test_proposals_fit_and_differ() -> None:
    words = words_for(backbone())
    found = fitting(words, backbone(), "digits_vit")
    assert len({each.what for each in found}) == len(found) > 40
    groups = {each.group for each in found}
    assert groups >= {"tome", "evit", "mstm", "pitome", "ats", "zerotprune", "cls-attention",
                      "merge-above"}  # fmt: skip
    assert not any("deit" in each.what for each in found)  # shipped for another model


def test_trials_are_in_a_fixed_random_order(reference: Reference) -> None:
    again = Reference(backbone(), source(), labels=True, seed=3)
    other = Reference(backbone(), source(), labels=True, seed=4)
    assert torch.equal(again.index, reference.index)
    assert not torch.equal(other.index, reference.index)
    assert other.index.sort().values.equal(reference.index.sort().values)
