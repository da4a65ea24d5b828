"""A rollout of an arena and the advantages computed from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class Rollout:
    """``T`` steps of ``B`` copies with ``A`` agents.

    Attributes:
        agents: ``(T, B, A, F)`` agents' own views.
        shared: ``(T, B, G)`` views shared by an image's agents.
        state: ``(T, B, S)`` global states.
        active: ``(T, B, A)`` bool, who could act.
        action: ``(T, B, A)`` int64.
        log_prob: ``(T, B, A)`` of the action when it was taken.
        value: ``(T, B, A)`` the critic's normalised prediction then.
        reward: ``(T, B, A)``.
        done: ``(T, B)`` bool, episode over after the step.
    """

    agents: Tensor
    shared: Tensor
    state: Tensor
    active: Tensor
    action: Tensor
    log_prob: Tensor
    value: Tensor
    reward: Tensor
    done: Tensor


def advantages(
    reward: Tensor,
    value: Tensor,
    active: Tensor,
    done: Tensor,
    last_value: Tensor,
    last_active: Tensor,
    *,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates with agents that die before the episode ends.

    For agents that stay active this is GAE (Schulman et al. 2016, eq. 16). An agent that is no
    longer active has no value of its own: nobody trains the critic there. What the episode still
    pays to it is a consequence of its last action and is counted in full, without bootstrapping.

    Args:
        reward: ``(T, B, A)``.
        value: ``(T, B, A)`` predicted returns, not normalised.
        active: ``(T, B, A)`` bool, who could act.
        done: ``(T, B)`` bool, episode over after the step.
        last_value: ``(B, A)`` prediction for the state after the last step.
        last_active: ``(B, A)`` bool, who can act there.
        gamma: discount.
        lam: GAE's lambda.

    Returns:
        ``(T, B, A)`` advantages and the returns ``advantage + value``. Where an agent is not
        active its advantage is 0 and its return is what the episode still pays it.
    """
    advantage = torch.zeros_like(reward)
    returns = torch.zeros_like(reward)
    next_active, next_value = last_active, torch.where(last_active, last_value, 0.0)
    next_advantage = torch.zeros_like(last_value)
    next_return = torch.zeros_like(last_value)
    for t in range(len(reward) - 1, -1, -1):
        goes_on = (~done[t]).float()[:, None]
        future = torch.where(next_active, next_value + lam * next_advantage, next_return)
        target = reward[t] + gamma * goes_on * future
        advantage[t] = torch.where(active[t], target - value[t], 0.0)
        returns[t] = target
        next_active, next_value = active[t], value[t]
        next_advantage, next_return = advantage[t], returns[t]
    return advantage, returns


def minibatches(
    rollout: Rollout, extra: dict[str, Tensor], count: int, generator: torch.Generator
) -> Iterator[tuple[Rollout, dict[str, Tensor]]]:
    """Split steps times copies at random into ``count`` parts; an image's agents stay together.

    Tensors come as ``(M, ...)``; ``generator`` is a CPU generator.
    """
    steps, batch = rollout.done.shape
    flat = {f.name: getattr(rollout, f.name).flatten(0, 1) for f in fields(rollout)}
    flat_extra = {name: value.flatten(0, 1) for name, value in extra.items()}
    order = torch.randperm(steps * batch, generator=generator).to(rollout.done.device)
    for index in order.chunk(count):
        yield (
            Rollout(**{name: value[index] for name, value in flat.items()}),
            {name: value[index] for name, value in flat_extra.items()},
        )
