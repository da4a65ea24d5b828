"""Passes of which only the logits are read, and lengths that are known beforehand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import needs_compiler
from test_backbone import family_model, image_for
from torch.testing import assert_close

import tokenenv
from agents.policies.words import parse_policy
from tokenenv.game.episode import EXECUTIONS
from tokenenv.game.policy import Policy, lengths_known, play
from tokenenv.game.rules import Observation
from tokenenv.game.rules.layer_merge import scaled
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.reduction import Match

KNOWN = (
    "keep-all", "random:keep=0.6", "cls-attention:keep=0.7", "norm:keep=0.5", "tome:r=5",
    "tome:r=3/9/9/1,shuffle=0", "tome:r=3/0/9/1", "tome:r=3/0/9/1,shuffle=0",
    "random-merge:r=4", "evit:keep=0.6", "evit:keep=0.6,fuse=0",
    "evit:keep=1", "mstm:keep=0.7", "mstm:keep=0.7,least=0.9", "pitome:keep=0.8",
    "zerotprune:keep=0.7", "diffrate:prune=3,merge=2", "diffrate:prune=90,merge=2",
    "tome:r=200", "tome:r=200,shuffle=0", "random-merge:r=200",
)  # fmt: skip
ADAPTIVE = ("merge-above:similarity=0.4", "random:keep=0.4..0.9", "ats:tokens=9")
KINDS = ("deit", "registers (DINOv2)", "average pooling, no class token", "distilled")


@pytest.fixture(params=KINDS, scope="module")
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return family_model(request.param)


def made(words: str, backbone: Backbone) -> Any:
    name, _, rest = words.partition(":")
    blocks = "blocks=1/2/3" if "/" not in rest and name not in ("tome", "diffrate") else ""
    return parse_policy(f"{name}:{','.join(filter(None, (rest, blocks)))}", backbone.depth)


def fits(words: str, backbone: Backbone) -> bool:
    needs = ("cls-attention", "evit", "mstm", "diffrate", "ats", "zerotprune")
    return backbone.has_class_token or not words.startswith(needs)


@pytest.mark.parametrize("words", KNOWN + ADAPTIVE)
def test_only_logits_are_the_logits(words: str, backbone: Backbone) -> None:
    if not fits(words, backbone):
        pytest.skip("needs a class token")
    images = image_for(backbone, 5)
    for execution in EXECUTIONS:
        with torch.inference_mode():
            whole = play(backbone, made(words, backbone), images, execution)
            short = play(backbone, made(words, backbone), images, execution, only_logits=True)
        assert_close(short.logits, whole.logits, atol=1e-5, rtol=0)
        if backbone.reads_prefix and 3 in whole.reduction.blocks and whole.reduction.between:
            assert short.step == whole.step - 1  # the last decision can't change anything
        else:
            assert short.step == whole.step


@pytest.mark.parametrize("words", KNOWN)
def test_known_lengths_are_the_lengths(words: str, backbone: Backbone) -> None:
    if not fits(words, backbone):
        pytest.skip("needs a class token")
    method = made(words, backbone)
    assert lengths_known(backbone, method)
    with torch.inference_mode():
        episode = play(backbone, method, image_for(backbone, 5), "masked")
    visual = backbone.patches
    for step, count in enumerate(episode.counts[1:]):
        visual = method.left(backbone, step, visual)
        assert count.tolist() == [visual] * 5


@pytest.mark.parametrize("words", ADAPTIVE)
def test_lengths_of_adaptive_methods_are_not_known(words: str) -> None:
    backbone = family_model("deit")
    assert not lengths_known(backbone, made(words, backbone))


@pytest.mark.parametrize("words", ["tome:r=5", "merge-above:similarity=0.4", "keep-all"])
def test_deciding_without_an_observation_is_deciding(words: str) -> None:
    backbone = family_model("deit")
    images = image_for(backbone, 6)

    class Watching(type(made(words, backbone))):  # type: ignore[misc]
        next_action = Policy.next_action

    method = made(words, backbone)
    seeing = made(words, backbone)
    seeing.__class__ = Watching
    with torch.inference_mode():
        found, wanted = play(backbone, method, images), play(backbone, seeing, images)
    assert torch.equal(torch.stack(found.counts), torch.stack(wanted.counts))
    assert torch.equal(found.logits, wanted.logits)


@pytest.mark.parametrize("bar", [0.3, 0.85, 0.9, 0.95])
def test_a_threshold_is_rounded_as_what_it_is_compared_with(bar: float) -> None:
    policy = made(f"merge-above:similarity={bar}", family_model("deit"))
    near = torch.tensor(bar)
    for _ in range(3):
        near = torch.nextafter(near, torch.tensor(0.0))
    scores = [near]
    for _ in range(6):
        scores.append(torch.nextafter(scores[-1], torch.tensor(1.0)))
    score = torch.stack([*scores, torch.tensor(-torch.inf)])[None]
    token = torch.zeros_like(score, dtype=torch.long)
    moment = SimpleNamespace(match=Match(token, token, score), step=0)
    found = policy.next_action(SimpleNamespace(moment=moment, step=0))
    possible = score > -torch.inf
    seen = Observation(
        scaled(torch.where(possible, score, 0.0))[..., None],
        score.new_zeros(1, 0),
        possible,
        0,
        {"similarity": slice(0, 1)},
    )
    assert torch.equal(found & possible, policy.act(seen).bool() & possible)
    assert 0 < found.sum() < 7


@needs_compiler
def test_a_pass_of_known_lengths_is_one_graph() -> None:
    backbone = family_model("deit")
    fast = tokenenv.compress(backbone.model, parse_policy("tome:r=5", backbone.depth))
    images = image_for(backbone, 3)
    graph = torch.compile(fast, fullgraph=True, dynamic=False)
    with torch.inference_mode():
        assert_close(graph(images), fast(images), atol=1e-4, rtol=0)
    torch.compiler.reset()
