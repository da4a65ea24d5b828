"""Advantages and policy loss against TorchRL's, on the same transitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from agents.learners.ppo import masked_mean, normalise_advantage, policy_loss
from agents.learners.rollout import advantages

GAMMA, LAM, CLIP = 0.9, 0.8, 0.2
COPIES, STEPS, AGENTS, ACTIONS, WIDTH = 3, 12, 2, 4, 5


@pytest.fixture
def torchrl() -> Any:
    """TorchRL's loss, and transitions with ends and time limits."""
    name = "torchrl.objectives.multiagent"
    pytest.importorskip(name, reason="TorchRL 0.14 is not installed: pip install '.[mpe2]'")
    from tensordict import TensorDict
    from tensordict.nn import InteractionType, TensorDictModule
    from torchrl.modules import MultiAgentMLP, ProbabilisticActor
    from torchrl.objectives.multiagent import MAPPOLoss

    torch.manual_seed(0)
    views = [("agents", "observation")]

    def network(outputs: int, centralised: bool, key: str) -> Any:
        mlp = MultiAgentMLP(
            WIDTH, outputs, AGENTS, centralized=centralised, share_params=True, depth=1,
            num_cells=8, activation_class=nn.Tanh,
        )  # fmt: skip
        return TensorDictModule(mlp, views, [("agents", key)])

    actor = ProbabilisticActor(
        network(ACTIONS, False, "logits"),
        in_keys={"logits": ("agents", "logits")},
        out_keys=[("agents", "action")],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
        log_prob_key=("agents", "log_prob"),
        default_interaction_type=InteractionType.RANDOM,
    )
    loss = MAPPOLoss(actor, network(1, True, "state_value"), clip_epsilon=CLIP, entropy_coeff=0.0)
    loss.set_keys(
        action=("agents", "action"),
        sample_log_prob=("agents", "log_prob"),
        value=("agents", "state_value"),
        **{key: ("agents", key) for key in ("reward", "done", "terminated")},
    )
    loss.make_value_estimator(gamma=GAMMA, lmbda=LAM)
    size, shape = [COPIES, STEPS], (COPIES, STEPS, AGENTS)
    data = TensorDict({"agents": {"observation": torch.randn(*shape, WIDTH)}}, size)
    with torch.no_grad():
        actor(data)
    done = (torch.rand(COPIES, STEPS, 1, 1) < 0.3).expand(*shape, 1)
    cut = done & (torch.rand(COPIES, STEPS, 1, 1) < 0.5).expand(*shape, 1)
    assert cut.any() and (done & ~cut).any()
    after = {
        "observation": torch.randn(*shape, WIDTH),
        "reward": torch.randn(*shape, 1) * 3,
        "done": done,
        "terminated": done & ~cut,
    }
    going_on = (~done)[:, :-1]  # a step that does not end an episode leads to the next one
    after["observation"][:, :-1] = torch.where(
        going_on, data["agents", "observation"][:, 1:], after["observation"][:, :-1]
    )
    data["next"] = TensorDict({"agents": after}, size)
    with torch.no_grad():
        loss.value_estimator(data)
    return loss, data


def by_time(tensor: torch.Tensor) -> torch.Tensor:
    """``(B, T, A, 1)`` -> ``(T, B, A)``."""
    return tensor[..., 0].transpose(0, 1)


def ours(data: Any) -> tuple[torch.Tensor, torch.Tensor]:
    following = by_time(data["next", "agents", "state_value"])
    done = by_time(data["next", "agents", "done"])
    cut = done & ~by_time(data["next", "agents", "terminated"])
    reward = by_time(data["next", "agents", "reward"])
    return advantages(
        reward + GAMMA * torch.where(cut, following, 0.0),
        by_time(data["agents", "state_value"]),
        torch.ones_like(done),
        done[:, :, 0],
        following[-1],
        torch.ones_like(done[0]),
        gamma=GAMMA,
        lam=LAM,
    )


def test_the_advantages_are_torchrls(torchrl: Any) -> None:
    _, data = torchrl
    advantage, returns = ours(data)
    assert_close(advantage, by_time(data["advantage"]), atol=1e-5, rtol=1e-5)
    assert_close(returns, by_time(data["value_target"]), atol=1e-5, rtol=1e-5)


def test_the_policy_loss_is_torchrls(torchrl: Any) -> None:
    """With advantages normalised for each agent apart, as TorchRL does, after some descent."""
    loss, data = torchrl
    with torch.no_grad():
        for parameter in loss.actor_network_params.values(True, True):
            parameter += 0.3 * torch.randn_like(parameter)
    terms = loss(data)
    assert 0 < terms["clip_fraction"] < 1
    with loss.actor_network_params.to_module(loss.actor_network):
        log_prob = loss.actor_network.get_dist(data).log_prob(data["agents", "action"])
    old = data["agents", "log_prob"]
    active = torch.ones_like(old, dtype=torch.bool)
    advantage = normalise_advantage(data["advantage"][..., 0], active, "per_agent")
    got, clipped = policy_loss(log_prob, old, advantage, active, CLIP)
    # TorchRL divides by the spread with n - 1, ours by that with n.
    scale = ((COPIES * STEPS - 1) / (COPIES * STEPS)) ** 0.5
    assert_close(got * scale, terms["loss_objective"], atol=1e-5, rtol=1e-4)
    assert_close(clipped, terms["clip_fraction"])
    assert_close(masked_mean(old - log_prob, active), terms["kl_approx"], atol=1e-5, rtol=1e-4)
