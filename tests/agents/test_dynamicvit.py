"""DynamicViT: decisions with a gradient, and those of the game."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import backbone, source
from test_backbone import family_model
from test_finetune import SMALL, tuner
from torch import Tensor

from agents.finetune.config import DynamicViTConfig
from agents.policies import load_policy
from agents.policies.dynamicvit import DynamicViTPolicy
from tokenenv.errors import UserError
from tokenenv.game.policy import Policy, play
from tokenenv.vit import attention

pytestmark = pytest.mark.usefixtures("one_thread")


def test_gated_attention_is_masked_attention_where_decisions_are_hard() -> None:
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 7, 3, 4, generator=rng) for _ in range(3))
    keep = (torch.rand(2, 7, generator=rng) < 0.6).float()
    keep[:, 0] = 1.0
    keep.requires_grad_(True)
    found = attention.gated(q, k, v, keep)
    expected = attention.padded(q, k, v, keep[:, None, None, :].bool())
    there = keep.bool()
    torch.testing.assert_close(found[there], expected[there], rtol=1e-5, atol=1e-5)
    # Equations 10 and 11 for one head and one query, in plain numbers; a finite difference.
    (slope,) = torch.autograd.grad(found[0, 0, 0, 0], keep)

    def plain(gate: list[float]) -> float:
        scores = [(q[0, 0, 0] @ k[0, j, 0]).item() / 2 for j in range(7)]
        parts = [np.exp(s) * (1.0 if j == 0 else gate[j]) for j, s in enumerate(scores)]
        return sum(p * v[0, j, 0, 0].item() for j, p in enumerate(parts)) / sum(parts)

    for j in range(7):
        gate = keep[0].tolist()
        gate[j] += 1e-4
        assert (plain(gate) - plain(keep[0].tolist())) / 1e-4 == pytest.approx(
            slope[0, j].item(), abs=1e-3
        )


def test_soft_play_is_the_masked_game_of_the_same_decisions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = DynamicViTConfig(**SMALL).method(backbone(), "digits_vit")
    batch = source().batch(torch.arange(5)).images
    drawn: list[Tensor] = []
    rng = torch.Generator().manual_seed(1)

    def draw(chances: Tensor, hard: bool) -> Tensor:
        drawn.append((torch.rand(chances.shape[:-1], generator=rng) < 0.7).long())
        return torch.nn.functional.one_hot(drawn[-1], 2).float() + 0 * chances

    monkeypatch.setattr("agents.policies.dynamicvit.F.gumbel_softmax", draw)
    tokens, keep, shortfall = policy.soft_play(backbone(), batch)
    seen: list[Tensor] = []

    class Replay(Policy):
        rules = policy.rules

        def act(self, observation: Any) -> Tensor:
            chances = policy.predictors[observation.step](observation.agents, observation.active)
            seen.append(chances)
            return drawn[observation.step]

    episode = play(backbone(), Replay(), batch, "masked")
    assert torch.equal(episode.tokens.visual_alive, keep.bool())
    torch.testing.assert_close(backbone().classify(tokens), episode.logits, rtol=1e-4, atol=1e-4)
    shares = [drawn[0].float().mean(1), keep.mean(1)]
    missed = [((s - 0.5 ** (i + 1)) ** 2).mean() for i, s in enumerate(shares)]
    assert shortfall.item() == pytest.approx(2 * torch.stack(missed).mean().item(), rel=1e-5)


def test_predictors_get_gradients_through_the_decisions() -> None:
    student = tuner(DynamicViTConfig(**SMALL)).student.train()
    torch.manual_seed(0)
    student(source().batch(torch.arange(4)).images).logits.square().sum().backward()
    for predictor in student.policy.predictors:
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in predictor.parameters())


def test_dynamicvit_keeps_the_best_and_is_saved(tmp_path: Path) -> None:
    policy = DynamicViTConfig(**SMALL).method(backbone(), "digits_vit")
    batch = source().batch(torch.arange(6)).images
    episodes = {how: play(backbone(), policy, batch, how) for how in ("masked", "packed")}
    assert [c.tolist() for c in episodes["masked"].counts] == [[64] * 6, [32] * 6, [16] * 6]
    torch.testing.assert_close(
        episodes["masked"].logits, episodes["packed"].logits, rtol=1e-4, atol=1e-4
    )
    policy.save(tmp_path / "p.safetensors")
    again = load_policy(tmp_path / "p.safetensors")
    assert isinstance(again, DynamicViTPolicy)
    assert torch.equal(
        play(backbone(), again, batch).logits, play(backbone(), policy, batch).logits
    )
    with pytest.raises(UserError, match="width 48"):
        again.check_fit(family_model("deit"), "")
