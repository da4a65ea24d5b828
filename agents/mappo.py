"""MAPPO (Yu et al. 2022): PPO for many agents that share one actor and one critic."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents.arena import Arena
from agents.networks import SharedMLP, ValueNorm
from agents.policy import ActorPolicy
from agents.rollout import Rollout, advantages, minibatches
from tokenenv.errors import UserError
from tokenenv.rules import Observation


@dataclass(frozen=True)
class MAPPOConfig:
    """Settings of :class:`MAPPO`. Defaults are on-policy's unless said otherwise.

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
        hidden: widths of the critic's hidden layers.
        centralised: whether the critic sees the global state; without it this is IPPO.
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
    hidden: tuple[int, ...] = (64, 64)
    centralised: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "epochs", "minibatches", "repeats"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.advantage_norm not in ("global", "per_agent"):
            raise UserError(
                f"advantage_norm='{self.advantage_norm}': choose 'global' or 'per_agent'"
            )


class MAPPO:
    """Trains an :class:`ActorPolicy` in an arena.

    The critic reads the agent's own view and the image's global state (an agent-specific global
    state); actor and critic have separate Adam optimisers. Agents that may not act count in no
    loss, no statistic and no advantage.

    Args:
        policy: the actor to train, in place.
        arena: the game; None for computing losses only.
        config: settings.
        seed: of action sampling and minibatch order.
    """

    def __init__(
        self, policy: ActorPolicy, arena: Arena, config: MAPPOConfig, *, seed: int = 0
    ) -> None:
        if config.repeats != getattr(arena, "repeats", 1):
            raise UserError(
                f"repeats={config.repeats} of the learner differs from the game's "
                f"{getattr(arena, 'repeats', 1)}: give both the same"
            )
        self.policy, self.arena, self.config = policy, arena, config
        device = next(policy.parameters()).device
        state = policy.widths.state if config.centralised else 0
        self.critic = SharedMLP(policy.widths.own, state, config.hidden, 1, gain=1.0).to(device)
        self.value_norm = ValueNorm().to(device)
        self.actor_optimiser = torch.optim.Adam(policy.parameters(), config.actor_lr, eps=1e-5)
        self.critic_optimiser = torch.optim.Adam(
            self.critic.parameters(), config.critic_lr, eps=1e-5
        )
        self.generator = torch.Generator(device).manual_seed(seed)
        self.order = torch.Generator().manual_seed(seed)
        self.observation: Observation | None = None

    def sample(self, observation: Observation) -> tuple[Tensor, Tensor]:
        """Draw actions ``(B, A)``; returns them with their log-probabilities."""
        log_probs = self.policy.logits(observation.agents, observation.shared).log_softmax(-1)
        # Gumbel-max: one kernel for all agents, and a generator of our own.
        noise = torch.rand(log_probs.shape, generator=self.generator, device=log_probs.device)
        action = (log_probs - (-noise.clamp(min=1e-20).log()).log()).argmax(-1)
        return action, log_probs.gather(-1, action[..., None])[..., 0]

    def predict(self, agents: Tensor, state: Tensor) -> Tensor:
        """Normalised values ``(..., A)``."""
        if not self.config.centralised:
            state = state[..., :0]
        return self.critic(agents, state)[..., 0]

    @torch.no_grad()
    def collect(self) -> tuple[Rollout, Tensor, Tensor]:
        """Play ``config.steps`` steps; returns the rollout, last values and last active mask."""
        columns: dict[str, list[Tensor]] = {f.name: [] for f in fields(Rollout)}
        for _ in range(self.config.steps):
            seen = self.observation or self.arena.reset()
            assert seen.state is not None
            action, log_prob = self.sample(seen)
            value = self.predict(seen.agents, seen.state)
            result = self.arena.step(action)
            self.observation = result.observation
            row = {
                "agents": seen.agents, "shared": seen.shared, "state": seen.state,
                "active": seen.active, "action": action, "log_prob": log_prob, "value": value,
                "reward": result.reward, "done": result.done,
            }  # fmt: skip
            for name, tensor in row.items():
                columns[name].append(tensor)
        rollout = Rollout(**{name: torch.stack(rows) for name, rows in columns.items()})
        if self.observation is None:
            empty = torch.zeros_like(rollout.value[-1])
            return rollout, empty, empty.bool()
        assert self.observation.state is not None
        last = self.predict(self.observation.agents, self.observation.state)
        return rollout, last, self.observation.active

    def update(self) -> dict[str, float]:
        """One rollout and its epochs of PPO; returns what to log: means over
        the epochs, ``reward`` per agent and finished episode, ``keep`` the share of last actions.

        Raises:
            UserError: the rewards of the rollout, or the losses, are not finite.
        """
        rollout, last_value, last_active = self.collect()
        if not bool(rollout.reward.isfinite().all()):
            raise UserError("a reward is not finite: check the environment's reward")
        c = self.config
        value, last = rollout.value, last_value
        if c.value_norm:
            value, last = self.value_norm.denormalise(value), self.value_norm.denormalise(last)
        advantage, returns = advantages(
            rollout.reward, value, rollout.active, rollout.done, last, last_active,
            gamma=c.gamma, lam=c.lam,
        )  # fmt: skip
        if c.value_norm:
            self.value_norm.update(returns, rollout.active)
            returns = self.value_norm.normalise(returns)
        if c.repeats > 1:
            advantage = centre_groups(advantage, rollout.active, c.repeats)
        extra = {
            "advantage": normalise_advantage(advantage, rollout.active, c.advantage_norm),
            "returns": returns,
        }
        logs: dict[str, list[Tensor]] = {}
        for _ in range(c.epochs):
            for batch, more in minibatches(rollout, extra, c.minibatches, self.order):
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
        acted = masked_mean((rollout.action == self.policy.actions - 1).float(), rollout.active)
        return {**means, "reward": total, "keep": acted.item()}

    def _descend(self, batch: Rollout, extra: dict[str, Tensor]) -> dict[str, Tensor]:
        c = self.config
        log_probs = self.policy.logits(batch.agents, batch.shared).log_softmax(-1)
        log_prob = log_probs.gather(-1, batch.action[..., None])[..., 0]
        surrogate, clipped = policy_loss(
            log_prob, batch.log_prob, extra["advantage"], batch.active, c.clip
        )
        entropy = masked_mean(-(log_probs.exp() * log_probs).sum(-1), batch.active)
        self.actor_optimiser.zero_grad(set_to_none=True)
        (surrogate - c.entropy * entropy).backward()
        actor_norm = nn.utils.clip_grad_norm_(self.policy.parameters(), c.max_grad_norm)
        self.actor_optimiser.step()

        value = self.predict(batch.agents, batch.state)
        loss = value_loss(
            value, batch.value, extra["returns"], batch.active,
            clip=c.clip if c.value_clip else None, huber_delta=c.huber_delta,
        )  # fmt: skip
        self.critic_optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.critic.parameters(), c.max_grad_norm)
        self.critic_optimiser.step()
        error = masked_mean((extra["returns"] - value.detach()) ** 2, batch.active)
        spread = masked_mean(
            (extra["returns"] - masked_mean(extra["returns"], batch.active)) ** 2, batch.active
        )
        return {
            "policy_loss": surrogate.detach(),
            "value_loss": loss.detach(),
            "entropy": entropy.detach(),
            "clipped": clipped,
            "kl": masked_mean(batch.log_prob - log_prob.detach(), batch.active),
            "actor_grad_norm": actor_norm,
            "explained_variance": 1 - error / spread.clamp(min=1e-12),
        }

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
