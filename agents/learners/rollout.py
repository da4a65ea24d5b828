"""A rollout of an arena and the advantages computed from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from agents.policies.trainable import Columns
from agents.workers import Rows


@dataclass
class Rollout:
    """``T`` steps of ``B`` copies with ``A`` agents.

    A head is a part of the action with a log-probability of its own. It has ``K`` of these per
    copy, and ``V`` values: one per agent, or one per copy.

    Attributes:
        seen: the tensors of the observations, ``(T, B, ...)`` each.
        choice: the tensors that the actor sampled, ``(T, B, ...)`` each, for its ``score``.
        action: ``(T, B, A)`` int64 actions played.
        log_prob: for each head ``(T, B, K)`` log-probability of its sample.
        mask: for each head ``(T, B, K)`` bool, which entries of ``log_prob`` count.
        value: for each head ``(T, B, V)`` the critic's normalised prediction.
        reward: ``(T, B, V)``.
        done: ``(T, B)`` bool, whether the episode ended after the step.
        beyond: ``(T, B, V)`` predicted return, not normalised, after a truncation in this step;
            0 where there was none.
    """

    seen: Columns
    choice: Columns
    action: Tensor
    log_prob: Columns
    mask: Columns
    value: Columns
    reward: Tensor
    done: Tensor
    beyond: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Rollout:
        """The rollout with ``function`` applied to every tensor."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        return Rollout(**{name: _map(function, value) for name, value in values.items()})


def stack(rows: list[Rollout]) -> Rollout:
    """Stack steps ``(B, ...)`` to a rollout ``(T, B, ...)``."""
    values = {f.name: [getattr(row, f.name) for row in rows] for f in fields(Rollout)}
    return Rollout(**{name: _stack(parts) for name, parts in values.items()})


def _map(function: Callable[[Tensor], Tensor], value: Tensor | Columns) -> Any:
    if isinstance(value, dict):
        return {name: function(tensor) for name, tensor in value.items()}
    return function(value)


def _stack(parts: list[Any]) -> Any:
    if isinstance(parts[0], dict):
        return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    return torch.stack(parts)


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
    """Generalised advantage estimates for agents that may become inactive within an episode.

    For agents that stay active this is GAE (Schulman et al. 2016, eq. 16). For an inactive agent
    the critic is not trained, so its value is not used. The rewards that the agent still gets are
    consequences of its last action and are added to it in full, without bootstrapping.

    Args:
        reward: ``(T, B, A)``.
        value: ``(T, B, A)`` predicted returns, not normalised.
        active: ``(T, B, A)`` bool, which agents could act.
        done: ``(T, B)`` bool, whether the episode ended after the step.
        last_value: ``(B, A)`` prediction for the state after the last step.
        last_active: ``(B, A)`` bool, which agents can act there.
        gamma: discount.
        lam: GAE's lambda.

    Returns:
        ``(T, B, A)`` advantages and the returns ``advantage + value``. For an inactive agent the
        advantage is 0 and the return is the sum of the rewards that it still gets.
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


def minibatches(steps: int, rows: Rows, count: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Split steps x copies at random into ``count`` minibatches, with all agents of a copy in one.

    The copies of all processes are split, and each process gets its own entries of every
    minibatch, possibly none.

    Args:
        steps: T.
        rows: this process's copies.
        count: number of minibatches.
        generator: a CPU generator in the same state in all processes.

    Returns:
        For each minibatch, int64 positions in this process's steps x copies.
    """
    order = torch.randperm(steps * rows.total, generator=generator)
    return map(rows.pick, order.chunk(count))


def pick(flat: Rollout, extra: Columns, index: Tensor) -> tuple[Rollout, Columns]:
    """The rows ``index`` of tensors ``(T * B, ...)``."""
    picked = partial(torch.index_select, dim=0, index=index)
    return flat.map(picked), {name: picked(value) for name, value in extra.items()}
