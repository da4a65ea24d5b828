from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from helpers import needs_compiler
from test_backbone import family_model
from torch.testing import assert_close

import agents
from agents.policies.actor import ActorPolicy, Widths
from tokenenv.game.policy import Method, play
from tokenenv.game.rules import LayerMerge, LayerPrune, TokenPrune
from tokenenv.game.segments import Segments
from tokenenv.vit.backbone import Backbone


def images_for(backbone: Backbone, batch: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *backbone.image_shape, generator=generator)


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Graphs are traced as for the compiler, and run operation by operation."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    yield
    torch.compiler.reset()


def acting(backbone: Backbone, rules: Any) -> Method:
    """A policy with random weights that removes some tokens, other ones for each image."""
    torch.manual_seed(1)
    widths = Widths(
        rules.agent_dim(backbone), rules.shared_dim(backbone), rules.state_dim(backbone)
    )
    policy = ActorPolicy(rules, widths, actions=rules.actions(backbone), decide="systematic")
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return policy.eval()


def methods(backbone: Backbone) -> dict[str, Method]:
    blocks = (0, 2)
    return {
        "merge": acting(backbone, LayerMerge(blocks, features=("cls_attention", "size"))),
        "count": acting(backbone, LayerMerge(blocks, action="count", grid=(0, 1, 2, 4))),
        "prune": acting(backbone, TokenPrune((1, 3), features=("token", "position"))),
        "block": acting(backbone, LayerPrune((0, 1, 2))),
        "above": agents.parse_policy("merge-above:similarity=0.3", backbone.depth),
        "ats": agents.parse_policy("ats:tokens=20,blocks=1/2", backbone.depth),
    }


KINDS = {"class token": "deit", "average": "average pooling, no class token"}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("class token", "merge"),
        ("class token", "count"),
        ("average", "prune"),
        ("class token", "block"),
        ("average", "above"),
        ("class token", "ats"),
    ],
)
def test_same_logits_as_uncompiled(kind: str, name: str) -> None:
    backbone = family_model(KINDS[kind])
    method = methods(backbone)[name]
    method.check_fit(backbone, "")
    segments = Segments(backbone, method)
    lengths = set()
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed, batch in enumerate((3, 2, 1, 1)):
            images = images_for(backbone, batch, seed)
            episode = play(backbone, method, images, "padded", only_logits=True)
            assert_close(segments(images), episode.logits, atol=1e-5, rtol=0)
            lengths.add(tuple(count.max().item() for count in episode.counts))
    assert len(lengths) > 1 or name == "count"  # the graphs took several lengths


def test_what_cannot_be_compiled_runs_as_it_is() -> None:
    backbone = family_model("deit")
    method = agents.parse_policy("random:keep=0.4..0.9,blocks=1/3,seed=3", backbone.depth)
    again = agents.parse_policy("random:keep=0.4..0.9,blocks=1/3,seed=3", backbone.depth)
    segments, images = Segments(backbone, method), images_for(backbone, 3)
    with torch.inference_mode():
        with pytest.warns(UserWarning, match="can't be compiled and runs as it is"):
            found = segments(images)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            segments(images)
        assert_close(found, play(backbone, again, images).logits, atol=1e-5, rtol=0)


def test_after_the_limit_of_graphs_it_runs_as_it_is() -> None:
    backbone = family_model("deit")
    method = agents.parse_policy("merge-above:similarity=0.3,blocks=1", backbone.depth)
    segments = Segments(backbone, method)
    with torch.inference_mode(), torch._dynamo.config.patch(recompile_limit=1):
        segments(images_for(backbone, 3))
        alone = images_for(backbone, 1)  # takes graphs of its own
        with pytest.warns(UserWarning, match="can't be compiled and runs as it is"):
            found = segments(alone)
        assert_close(found, play(backbone, method, alone).logits, atol=1e-5, rtol=0)


def test_hooks_see_blocks() -> None:
    backbone = family_model("deit")
    method = agents.parse_policy("merge-above:similarity=0.3", backbone.depth)
    seen: list[int] = []
    hook = backbone.blocks[1].register_forward_hook(lambda *_: seen.append(1))
    with torch.inference_mode():
        Segments(backbone, method)(images_for(backbone, 2))
    hook.remove()
    assert seen == [1]


@needs_compiler
def test_graphs_are_made_in_the_first_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.undo()  # the compiler itself
    backbone = family_model("deit")
    method = agents.parse_policy("merge-above:similarity=0.3,blocks=1/3", backbone.depth)
    torch.compiler.reset()
    counters.clear()
    segments, made = Segments(backbone, method), []
    with torch.inference_mode():
        for batch in (4, 5, 6, 7):
            images = images_for(backbone, batch, seed=batch)
            plain = play(backbone, method, images, "padded", only_logits=True).logits
            assert_close(segments(images), plain, atol=1e-4, rtol=0)
            made.append(counters["stats"]["unique_graphs"])
    assert made[0] >= 2 and made[1:] == [made[1]] * 3
