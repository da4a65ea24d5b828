"""PPO (Schulman et al. 2017) for actions of several parts: what MAPPO and DORA have in common."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents.arena import Arena, Step
from agents.networks import ValueNorm
from agents.rollout import Columns, Rollout, advantages, columns, minibatches, stack
from tokenenv.errors import UserError
from tokenenv.rules import Observation


class Head(NamedTuple):
    """One part of an action: ``(B, K)`` log-probabilities, entropies, and whether they count."""

    log_prob: Tensor
    entropy: Tensor
    mask: Tensor


class Actor(Protocol):
    """A policy that can be trained."""

    heads: tuple[str, ...]

    def draw(self, seen: Columns, generator: torch.Generator) -> tuple[Tensor, Columns]:
        """Actions ``(B, A)`` for the game, and what was drawn, for :meth:`score`."""

    def score(self, seen: Columns, choice: Columns) -> dict[str, Head]:
        """Every head's log-probability of ``choice``."""

    def kept(self, action: Tensor) -> Tensor:
        """Bool, as ``action``: which actions keep what they decide about."""

    def rates(self) -> Iterable[tuple[list[nn.Parameter], float]]:
        """Parameters and their share of the learning rate."""

    def shared(self) -> tuple[list[nn.Parameter], tuple[str, str]] | None:
        """Parameters that two heads share, whose gradients may be at odds; or None."""

    def parameters(self) -> Iterable[nn.Parameter]: ...  # noqa: D102
    def state_dict(self) -> Mapping[str, Any]: ...  # noqa: D102
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...  # noqa: D102


class Critic(Protocol):
    """Predicts normalised returns."""

    def __call__(self, seen: Columns, choice: Columns | None) -> dict[str, Tensor]:
        """For each head ``(B, V)``; without a choice only what does not depend on it."""

    def parameters(self) -> Iterable[nn.Parameter]: ...  # noqa: D102
    def state_dict(self) -> Mapping[str, Any]: ...  # noqa: D102
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...  # noqa: D102


@dataclass(frozen=True)
class PPOConfig:
    """Settings of :class:`PPO`. Defaults are on-policy's MAPPO's unless said otherwise.

    Attributes:
        steps: rollout length T per update; an episode of the token game is shorter.
        epochs, minibatches: passes over a rollout, parts per pass.
        gamma, lam: discount and GAE's lambda. gamma 1: an episode has a handful of steps.
        clip: PPO's epsilon, for the ratio and for the value change (normalised units).
        actor_lr, critic_lr: Adam, epsilon 1e-5.
        entropy: weight of the entropy bonus.
        huber_delta: where the value loss turns linear (normalised units); 0 for squared error.
        value_clip, value_norm: clip the value change; predict normalised returns.
        advantage_norm: over all active agents at once, or for each agent apart.
        repeats: how many neighbours in the batch play the same image; the mean advantage of
            such a group is subtracted, which takes out what the image made of the reward.
        max_grad_norm: of actor and of critic.
    """

    steps: int = 3
    epochs: int = 4
    minibatches: int = 4
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    actor_lr: float = 5e-4
    critic_lr: float = 5e-4
    entropy: float = 0.01
    huber_delta: float = 10.0
    value_clip: bool = True
    value_norm: bool = True
    advantage_norm: Literal["global", "per_agent"] = "global"
    repeats: int = 1
    max_grad_norm: float = 10.0

    def __post_init__(self) -> None:
        for name in ("steps", "epochs", "minibatches", "repeats"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.advantage_norm not in ("global", "per_agent"):
            raise UserError(
                f"advantage_norm='{self.advantage_norm}': choose 'global' or 'per_agent'"
            )


class PPO:
    """Trains an actor in an arena with a critic.

    Advantages come from the first head's values by GAE; ``R = A + V`` is the return of all, and a
    further head's advantage is ``R`` less its own value (arXiv 2609.34325, "Optimisation"). Each
    head has a clipped loss and an advantage normalised over the steps in which it counts. What may
    not act counts in no loss, no statistic and no advantage. Where a time limit cuts an episode
    short, the critic says what the rest would have been worth.

    Args:
        policy: the actor to train, in place.
        critic: predicts returns; on the policy's device.
        arena: the game. If its reward is ``(B, 1)``, all agents of a copy share it, and one value.
        config: settings.
        seed: of action sampling and minibatch order.
    """

    def __init__(
        self, policy: Actor, critic: Critic, arena: Arena, config: PPOConfig, *, seed: int = 0
    ) -> None:
        if config.repeats != getattr(arena, "repeats", 1):
            raise UserError(
                f"repeats={config.repeats} of the learner differs from the game's "
                f"{getattr(arena, 'repeats', 1)}: give both the same"
            )
        self.policy, self.critic, self.arena, self.config = policy, critic, arena, config
        device = next(iter(policy.parameters())).device
        self.value_norm = ValueNorm().to(device)
        self.actor_optimiser = torch.optim.Adam(
            [{"params": group, "lr": config.actor_lr * rate} for group, rate in policy.rates()],
            eps=1e-5,
        )
        self.critic_optimiser = torch.optim.Adam(critic.parameters(), config.critic_lr, eps=1e-5)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.order = torch.Generator().manual_seed(seed)
        self.observation: Observation | None = None

    @torch.no_grad()
    def collect(self) -> tuple[Rollout, Tensor, Tensor]:
        """Play ``config.steps`` steps; returns the rollout, last values and last active mask."""
        rows: list[Rollout] = []
        for _ in range(self.config.steps):
            seen = columns(self.observation or self.arena.reset())
            action, choice = self.policy.draw(seen, self.generator)
            heads = self.policy.score(seen, choice)
            log_prob = {name: head.log_prob for name, head in heads.items()}
            mask = {name: head.mask for name, head in heads.items()}
            value = self.critic(seen, choice)
            result = self.arena.step(action)
            self.observation = result.observation
            beyond = self._beyond(result)
            reward, done = result.reward, result.done
            rows.append(Rollout(seen, choice, action, log_prob, mask, value, reward, done, beyond))
        rollout = stack(rows)
        if self.observation is None:
            empty = torch.zeros_like(rollout.reward[-1])
            return rollout, empty, empty.bool()
        seen = columns(self.observation)
        last = self.critic(seen, None)[self.policy.heads[0]]
        return rollout, last, _counting(seen["active"], last)

    def _beyond(self, result: Step) -> Tensor:
        """``(B, V)`` predicted return after a time limit's cut; 0 where there was none.

        The limit is no part of the game: what would have come is worth what the critic says of
        the state where play stopped ("partial-episode bootstrapping", Pardo et al., "Time Limits
        in Reinforcement Learning", ICML 2018). After an end of the game's own nothing comes.
        """
        cut = getattr(result, "cut", None)
        if cut is None:
            return torch.zeros_like(result.reward)
        seen = columns(cut)
        value = self.critic(seen, None)[self.policy.heads[0]]
        counts = _counting(seen["active"], value)
        if self.config.value_norm:
            value = self.value_norm.denormalise(value)
        return torch.where(counts, value, 0.0)

    def update(self) -> dict[str, float]:
        """One rollout and its epochs of PPO.

        Returns:
            What to log: means over the epochs, ``reward`` per value and finished episode, ``keep``
            the share of decisions that keep.

        Raises:
            UserError: the rewards of the rollout, or the losses, are not finite.
        """
        rollout, last_value, last_active = self.collect()
        if not bool(rollout.reward.isfinite().all()):
            raise UserError("a reward is not finite: check the environment's reward")
        extra = self._credit(rollout, last_value, last_active)
        logs: dict[str, list[Tensor]] = {}
        for _ in range(self.config.epochs):
            for batch, more in minibatches(rollout, extra, self.config.minibatches, self.order):
                for name, number in self._descend(batch, more).items():
                    logs.setdefault(name, []).append(number)
        means = {name: torch.stack(v).mean().item() for name, v in logs.items()}
        if not all(math.isfinite(value) for value in means.values()):
            raise UserError(
                f"training diverged (losses {means['policy_loss']:g} and {means['value_loss']:g}): "
                "use a smaller learning rate"
            )
        episodes = rollout.done.sum().clamp(min=1)
        total = (rollout.reward.sum() / (episodes * rollout.reward.shape[2])).item()
        kept = masked_mean(self.policy.kept(rollout.action).float(), rollout.seen["active"])
        return {**means, "reward": total, "keep": kept.item()}

    def _credit(self, rollout: Rollout, last_value: Tensor, last_active: Tensor) -> Columns:
        """Normalised advantages of every head, and the normalised returns."""
        c, norm = self.config, self.value_norm
        value, last = rollout.value, last_value
        if c.value_norm:
            value = {name: norm.denormalise(v) for name, v in value.items()}
            last = norm.denormalise(last)
        first = self.policy.heads[0]
        active = _counting(rollout.mask[first], value[first])
        advantage, returns = advantages(
            rollout.reward + c.gamma * rollout.beyond, value[first], active, rollout.done,
            last, last_active, gamma=c.gamma, lam=c.lam,
        )  # fmt: skip
        if c.value_norm:
            norm.update(returns, active)
        extra = {"returns": norm.normalise(returns) if c.value_norm else returns}
        for name in self.policy.heads:
            mask = _counting(rollout.mask[name], value[name])
            if name != first:
                advantage = torch.where(mask, returns - value[name], 0.0)
            if c.repeats > 1:
                advantage = centre_groups(advantage, mask, c.repeats)
            extra[name] = normalise_advantage(advantage, mask, c.advantage_norm)
        return extra

    def _descend(self, batch: Rollout, extra: Columns) -> dict[str, Tensor]:
        """One step of actor and critic on a minibatch."""
        c = self.config
        heads = self.policy.score(batch.seen, batch.choice)
        losses: dict[str, Tensor] = {}
        surrogates, entropies, clips, divergences = [], [], [], []
        for name, head in heads.items():
            old = batch.log_prob[name]
            advantage = extra[name].expand_as(old)
            surrogate, clipped = policy_loss(head.log_prob, old, advantage, head.mask, c.clip)
            entropy = masked_mean(head.entropy, head.mask)
            losses[name] = surrogate - c.entropy * entropy
            surrogates.append(surrogate.detach())
            entropies.append(entropy.detach())
            clips.append(clipped)
            divergences.append(masked_mean(old - head.log_prob.detach(), head.mask))
        self.actor_optimiser.zero_grad(set_to_none=True)
        self._backward(losses)
        actor_norm = nn.utils.clip_grad_norm_(self.policy.parameters(), c.max_grad_norm)
        self.actor_optimiser.step()
        value = self.critic(batch.seen, batch.choice)
        loss = torch.zeros((), device=extra["returns"].device)
        for name, predicted in value.items():
            loss = loss + value_loss(
                predicted, batch.value[name], extra["returns"],
                _counting(batch.mask[name], predicted),
                clip=c.clip if c.value_clip else None, huber_delta=c.huber_delta,
            )  # fmt: skip
        self.critic_optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.critic.parameters(), c.max_grad_norm)
        self.critic_optimiser.step()
        name = self.policy.heads[0]
        first, returns = value[name].detach(), extra["returns"]
        counts = _counting(batch.mask[name], first)
        error = masked_mean((returns - first) ** 2, counts)
        spread = masked_mean((returns - masked_mean(returns, counts)) ** 2, counts)
        return {
            "policy_loss": torch.stack(surrogates).sum(),
            "value_loss": loss.detach(),
            "entropy": torch.stack(entropies).sum(),
            "clipped": torch.stack(clips).mean(),
            "kl": torch.stack(divergences).mean(),
            "actor_grad_norm": actor_norm,
            "explained_variance": 1 - error / spread.clamp(min=1e-12),
        }

    def _backward(self, losses: dict[str, Tensor]) -> None:
        """Gradients of the sum of the losses; those of shared parameters with PCGrad."""
        shared = self.policy.shared()
        if shared is None:
            torch.stack(list(losses.values())).sum().backward()
            return
        parameters, pair = shared
        one, other = (
            torch.autograd.grad(losses[name], parameters, retain_graph=True, allow_unused=True)
            for name in pair
        )
        torch.stack(list(losses.values())).sum().backward()
        for parameter, grad in zip(parameters, surgery(one, other), strict=True):
            parameter.grad = grad

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs, beside the arena."""
        return {
            "policy": self.policy.state_dict(),
            "critic": self.critic.state_dict(),
            "value_norm": self.value_norm.state_dict(),
            "actor_optimiser": self.actor_optimiser.state_dict(),
            "critic_optimiser": self.critic_optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "order": self.order.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.policy.load_state_dict(state["policy"])
        self.critic.load_state_dict(state["critic"])
        self.value_norm.load_state_dict(state["value_norm"])
        self.actor_optimiser.load_state_dict(state["actor_optimiser"])
        self.critic_optimiser.load_state_dict(state["critic_optimiser"])
        self.generator.set_state(state["generator"].cpu())
        self.order.set_state(state["order"].cpu())


def _counting(mask: Tensor, value: Tensor) -> Tensor:
    """Where a value counts: one per number of the head, or one per copy for all of them."""
    return mask if mask.shape == value.shape else mask.any(-1, keepdim=True)


def surgery(
    one: tuple[Tensor | None, ...], other: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """PCGrad (Yu et al. 2020) for two losses: the sum of their gradients without their conflict.

    Each gradient loses its component along the other where the two point apart.
    """
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    dot = sum(((a * b).sum() for a, b in pairs), torch.zeros(()))
    conflict = torch.as_tensor(dot).clamp(max=0)
    lengths = [sum((g**2).sum() for g in part if g is not None) for part in (one, other)]
    result: list[Tensor | None] = []
    for a, b in zip(one, other, strict=True):
        if a is None or b is None:
            result.append(a if b is None else b)
            continue
        first = a - conflict / (lengths[1] + 1e-12) * b
        second = b - conflict / (lengths[0] + 1e-12) * a
        result.append(first + second)
    return result


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``values`` where ``mask``; 0 where the mask is empty."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def normalise_advantage(
    advantage: Tensor, active: Tensor, over: Literal["global", "per_agent"]
) -> Tensor:
    """``(T, B, A)`` to mean 0 and spread 1 over the active agents, or over each agent apart."""
    dims = (0, 1, 2) if over == "global" else (0, 1)
    count = active.sum(dims, keepdim=True).clamp(min=1)
    mean = torch.where(active, advantage, 0.0).sum(dims, keepdim=True) / count
    centred = torch.where(active, advantage - mean, 0.0)
    return centred / ((centred**2).sum(dims, keepdim=True) / count + 1e-10).sqrt()


def centre_groups(advantage: Tensor, active: Tensor, repeats: int) -> Tensor:
    """Subtract the mean over the active agents of each ``repeats`` neighbours. ``(T, B, A)``."""
    groups = (len(advantage), -1, repeats, advantage.shape[2])
    values, mask = advantage.reshape(groups), active.reshape(groups)
    count = mask.sum((2, 3), keepdim=True).clamp(min=1)
    mean = torch.where(mask, values, 0.0).sum((2, 3), keepdim=True) / count
    return torch.where(mask, values - mean, 0.0).reshape(advantage.shape)


def policy_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, active: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7) over active agents.

    All arguments ``(..., A)``. Returns the loss and the share of clipped ratios.
    """
    # An agent that may not act has no meaningful ratio; without this, inf * 0 could be NaN.
    ratio = torch.where(active, log_prob - old_log_prob, 0.0).exp()
    surrogate = torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    clipped = masked_mean(((ratio - 1).abs() > clip).float(), active)
    return -masked_mean(surrogate, active), clipped.detach()


def value_loss(
    value: Tensor,
    old_value: Tensor,
    returns: Tensor,
    active: Tensor,
    *,
    clip: float | None,
    huber_delta: float,
) -> Tensor:
    """Squared or Huber error, the larger of unclipped and clipped, over active agents."""

    def error(prediction: Tensor) -> Tensor:
        if huber_delta:
            return F.huber_loss(prediction, returns, reduction="none", delta=huber_delta)
        return 0.5 * (prediction - returns) ** 2

    loss = error(value)
    if clip is not None:
        loss = torch.max(loss, error(old_value + (value - old_value).clamp(-clip, clip)))
    return masked_mean(loss, active)
