"""PPO (Schulman et al. 2017) for actions with several heads; MAPPO and DORA use it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from agents.learners.arena import Arena, Step
from agents.learners.losses import (
    AdvantageNorm,
    Size,
    centre_groups,
    counting,
    masked_mean,
    measure,
    normalise_advantage,
    policy_loss,
    surgery,
    value_loss,
)
from agents.learners.rollout import Rollout, advantages, minibatches, pick, stack
from agents.learners.value_norm import ValueNorm
from agents.policies.trainable import Columns, Trainable, columns
from agents.restoring import restore
from agents.workers import ALONE, Rows, Workers
from tokenenv.errors import UserError, check_choice
from tokenenv.game.rules import Observation


class Critic(Protocol):
    """Predicts normalised returns."""

    def __call__(self, seen: Columns, choice: Columns | None) -> dict[str, Tensor]:
        """Values ``(B, V)`` for each head; without a choice only those independent of it."""

    def parameters(self) -> Iterable[nn.Parameter]: ...  # noqa: D102
    def state_dict(self) -> Mapping[str, Any]: ...  # noqa: D102
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...  # noqa: D102


@dataclass(frozen=True)
class PPOConfig:
    """Settings of :class:`PPO`; in parentheses stable-baselines3's name where it differs.

    Defaults are those of on-policy's MAPPO unless noted.

    Attributes:
        steps: rollout length T per update (``n_steps``); of a :class:`~tokenenv.Game` one episode,
            ``game.steps``.
        epochs: passes over a rollout (``n_epochs``); on-policy: 15.
        minibatches: minibatches per pass; on-policy: 1. ``batch_size`` is the rollout's size
            divided by it.
        gamma: discount; 1, as an episode has few steps.
        lam: GAE's lambda (``gae_lambda``).
        clip: PPO's epsilon (``clip_range``), for the ratio and for the value change (normalised
            units).
        actor_lr, critic_lr: learning rates (``learning_rate``) of Adam with epsilon 1e-5.
        entropy: weight of the entropy bonus (``ent_coef``).
        huber_delta: error from which the value loss is linear (normalised units); 0: squared error.
        value_clip: whether to clip the value change.
        value_norm: whether the critic predicts normalised returns.
        advantage_norm: normalise advantages over all active agents (``global``), or for each agent
            separately (``per_agent``).
        repeats: number of consecutive images in the batch that are the same; the mean advantage of
            such a group is subtracted, which removes the image's own effect on the reward: the
            mean over all its agents, or each agent's own with :attr:`own_baseline`.
        max_grad_norm: largest gradient norm of the actor and of the critic.

    Raises:
        UserError: a value is out of range or unknown.
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
    advantage_norm: AdvantageNorm = "global"
    repeats: int = 1
    max_grad_norm: float = 10.0

    def __post_init__(self) -> None:
        for name in ("steps", "epochs", "minibatches", "repeats"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        check_choice("advantage_norm", self.advantage_norm, AdvantageNorm)

    @property
    def own_baseline(self) -> bool:
        """Whether each agent's baseline holds its own advantages alone, see ``repeats``."""
        return False


class PPO:
    """Trains an actor in an arena with a critic.

    Advantages are computed by GAE from the first head's values. ``R = A + V`` is the return for all
    heads, and another head's advantage is ``R`` minus its own value (arXiv 2609.34325,
    "Optimisation"). Each head has a clipped loss and an advantage normalised over the steps in
    which it is used. Inactive agents are masked out of losses, statistics and advantages. If a time
    limit truncates an episode, the return is bootstrapped from the critic.

    In data-parallel training each process plays a part of the copies, and the result is that of a
    single process with all copies: the processes draw the same random numbers and minibatches, and
    exchange gradients and sums. All repeats of an image must be in the same process.

    Args:
        policy: the actor to train, in place.
        critic: predicts returns; on the policy's device.
        arena: the game. If its reward is ``(B, 1)``, all agents of a copy share it and one value.
        config: settings.
        seed: seed of action sampling and minibatch order.
        workers: the processes that train together, each with its own arena and the same initial
            weights.

    Raises:
        UserError: ``config.repeats`` differs from the game's.
    """

    def __init__(
        self,
        policy: Trainable,
        critic: Critic,
        arena: Arena,
        config: PPOConfig,
        *,
        seed: int = 0,
        workers: Workers = ALONE,
    ) -> None:
        if config.repeats != getattr(arena, "repeats", 1):
            raise UserError(
                f"repeats={config.repeats} of the learner differs from the game's "
                f"{getattr(arena, 'repeats', 1)}: give both the same"
            )
        self.policy, self.critic, self.arena, self.config = policy, critic, arena, config
        self.workers = workers
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

    # Cached at the first update, not set before: an exchange in __init__ would leave the other
    # processes waiting if this one still fails while it is set up.
    @cached_property
    def rows(self) -> Rows:
        """The positions of this process's copies among those of all processes."""
        return Rows.of(self.workers, self.arena.batch_size)

    @torch.no_grad()
    def collect(self) -> tuple[Rollout, Tensor, Tensor]:
        """Play ``config.steps`` steps; returns the rollout, last values and last active mask."""
        rows: list[Rollout] = []
        for _ in range(self.config.steps):
            seen = columns(self.observation or self.arena.reset())
            action, choice = self.policy.draw(seen, self.generator, self.rows)
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
        return rollout, last, counting(seen["active"], last)

    def _beyond(self, result: Step) -> Tensor:
        """``(B, V)`` predicted return after a truncation; 0 where there was none.

        A time limit is not part of the game, so the return after it is estimated by the critic at
        the last observation ("partial-episode bootstrapping", Pardo et al., "Time Limits in
        Reinforcement Learning", ICML 2018). After a termination the return is 0.
        """
        cut = getattr(result, "cut", None)
        if cut is None:
            return torch.zeros_like(result.reward)
        seen = columns(cut)
        value = self.critic(seen, None)[self.policy.heads[0]]
        counts = counting(seen["active"], value)
        if self.config.value_norm:
            value = self.value_norm.denormalise(value)
        return torch.where(counts, value, 0.0)

    def update(self) -> dict[str, float]:
        """One rollout and its epochs of PPO.

        Returns:
            Numbers to log: means over the epochs; ``reward``, per value and finished episode;
            ``keep``, the share of decisions that keep their token.

        Raises:
            UserError: the rewards of the rollout, or the losses, are not finite.
        """
        rollout, last_value, last_active = self.collect()
        if self.workers.agree(not bool(rollout.reward.isfinite().all())):
            raise self.workers.mistake("a reward is not finite: check the environment's reward")
        extra = self._credit(rollout, last_value, last_active)
        flat = rollout.map(lambda t: t.flatten(0, 1))
        extra = {name: value.flatten(0, 1) for name, value in extra.items()}
        parts = [
            part.to(rollout.done.device)
            for _ in range(self.config.epochs)
            for part in minibatches(
                len(rollout.done), self.rows, self.config.minibatches, self.order
            )
        ]
        logs = [
            self._descend(*pick(flat, extra, part), size)
            for part, size in zip(parts, self._sizes(flat, extra, parts), strict=True)
        ]
        return self._report(rollout, logs)

    def _report(self, rollout: Rollout, logs: list[Columns]) -> dict[str, float]:
        """The numbers that :meth:`update` returns, over all processes."""
        mine = {name: torch.stack([row[name] for row in logs]) for name in logs[0]}
        norm = mine.pop("actor_grad_norm")  # the same everywhere
        active = rollout.seen["active"]
        kept = torch.where(active, self.policy.kept(rollout.action).float(), 0.0)
        *sums, reward, episodes, keep, decisions = self.workers.sum(
            *mine.values(), rollout.reward.sum(), rollout.done.sum(), kept.sum(), active.sum()
        )
        numbers = dict(zip(mine, sums, strict=True)) | {"actor_grad_norm": norm}
        error, spread = numbers.pop("error"), numbers.pop("spread")
        numbers["explained_variance"] = 1 - error / spread.clamp(min=1e-12)
        total = reward / (episodes.clamp(min=1) * rollout.reward.shape[2])
        numbers |= {"reward": total, "keep": keep / decisions.clamp(min=1)}
        # One transfer from the device instead of one for each number.
        found = torch.stack([number.mean().double() for number in numbers.values()]).tolist()
        means = dict(zip(numbers, found, strict=True))
        if not all(math.isfinite(value) for value in means.values()):
            raise self.workers.mistake(
                f"training diverged (losses {means['policy_loss']:g} and {means['value_loss']:g}): "
                "use a smaller learning rate"
            )
        return means

    def _sizes(self, flat: Rollout, extra: Columns, parts: list[Tensor]) -> list[Size]:
        """The sums of :func:`measure` for each minibatch, over all processes."""
        heads = self.policy.heads
        found = []
        for part in parts:
            mask = {name: flat.mask[name].index_select(0, part) for name in heads}
            value = {name: flat.value[name].index_select(0, part) for name in heads}
            found.append(measure(mask, value, extra["returns"].index_select(0, part)))
        width = len(found[0])
        whole = self.workers.sum(*(number for size in found for number in size.values()))
        return [
            dict(zip(found[0], whole[first : first + width], strict=True))
            for first in range(0, len(whole), width)
        ]

    def _credit(self, rollout: Rollout, last_value: Tensor, last_active: Tensor) -> Columns:
        """Normalised advantages of every head, and normalised returns."""
        c, norm = self.config, self.value_norm
        value, last = rollout.value, last_value
        if c.value_norm:
            value = {name: norm.denormalise(v) for name, v in value.items()}
            last = norm.denormalise(last)
        first = self.policy.heads[0]
        active = counting(rollout.mask[first], value[first])
        advantage, returns = advantages(
            rollout.reward + c.gamma * rollout.beyond, value[first], active, rollout.done,
            last, last_active, gamma=c.gamma, lam=c.lam,
        )  # fmt: skip
        if c.value_norm:
            norm.update(returns, active, self.workers)
        extra = {"returns": norm.normalise(returns) if c.value_norm else returns}
        for name in self.policy.heads:
            mask = counting(rollout.mask[name], value[name])
            if name != first:
                advantage = torch.where(mask, returns - value[name], 0.0)
            if c.repeats > 1:
                advantage = centre_groups(advantage, mask, c.repeats, c.own_baseline)
            extra[name] = normalise_advantage(advantage, mask, c.advantage_norm, self.workers)
        return extra

    def _descend(
        self, batch: Rollout, extra: Columns, size: Size | None = None
    ) -> dict[str, Tensor]:
        """One optimiser step of actor and critic on a minibatch.

        ``size``: the sums of :func:`measure` over all processes; None: those of this minibatch.

        Returns:
            Numbers that add up over the processes, and the norm of the actor's gradient.
        """
        c = self.config
        size = size or measure(batch.mask, batch.value, extra["returns"])
        heads = self.policy.score(batch.seen, batch.choice)
        losses: dict[str, Tensor] = {}
        surrogates, entropies, clips, divergences = [], [], [], []
        for name, head in heads.items():
            old, count = batch.log_prob[name], size[name]
            advantage = extra[name].expand_as(old)
            surrogate, clipped = policy_loss(
                head.log_prob, old, advantage, head.mask, c.clip, count
            )
            entropy = masked_mean(head.entropy, head.mask, count)
            losses[name] = surrogate - c.entropy * entropy
            surrogates.append(surrogate.detach())
            entropies.append(entropy.detach())
            clips.append(clipped)
            divergences.append(masked_mean(old - head.log_prob.detach(), head.mask, count))
        value = self.critic(batch.seen, batch.choice)
        loss = torch.zeros((), device=extra["returns"].device)
        for name, predicted in value.items():
            loss = loss + value_loss(
                predicted, batch.value[name], extra["returns"],
                counting(batch.mask[name], predicted),
                clip=c.clip if c.value_clip else None, huber_delta=c.huber_delta,
                count=size[f"values of {name}"],
            )  # fmt: skip
        self.actor_optimiser.zero_grad(set_to_none=True)
        self.critic_optimiser.zero_grad(set_to_none=True)
        self._backward(losses, loss)
        actor_norm = nn.utils.clip_grad_norm_(self.policy.parameters(), c.max_grad_norm)
        self.actor_optimiser.step()
        nn.utils.clip_grad_norm_(self.critic.parameters(), c.max_grad_norm)
        self.critic_optimiser.step()
        name = self.policy.heads[0]
        first, returns = value[name].detach(), extra["returns"]
        counts, count = counting(batch.mask[name], first), size[f"values of {name}"]
        level = size["returns"] / count.clamp(min=1)
        return {
            "policy_loss": torch.stack(surrogates).sum(),
            "value_loss": loss.detach(),
            "entropy": torch.stack(entropies).sum(),
            "clipped": torch.stack(clips).mean(),
            "kl": torch.stack(divergences).mean(),
            "error": masked_mean((returns - first) ** 2, counts, count),
            "spread": masked_mean((returns - level) ** 2, counts, count),
            "actor_grad_norm": actor_norm,
        }

    def _backward(self, losses: dict[str, Tensor], value: Tensor | None = None) -> None:
        """Gradients of the sum of the actor's losses and of the critic's loss, over all processes.

        Parameters that two heads share get their gradient by PCGrad, applied to each head's total
        gradient over all processes.
        """
        parameters, pair = self.policy.shared() or ([], ())
        apart = [
            torch.autograd.grad(losses[name], parameters, retain_graph=True, allow_unused=True)
            for name in pair
        ]
        torch.stack([*losses.values(), *([] if value is None else [value])]).sum().backward()
        known = {id(parameter) for parameter in parameters}
        every = (*self.policy.parameters(), *self.critic.parameters())
        others = [parameter for parameter in every if id(parameter) not in known]
        gradients = self.workers.sum_gradients(
            [*itertools.chain(*apart), *(parameter.grad for parameter in others)],
            [*parameters * len(apart), *others],
        )
        n = len(parameters)
        for parameter, grad in zip(others, gradients[n * len(apart) :], strict=True):
            parameter.grad = grad
        if pair:
            merged = surgery(tuple(gradients[:n]), tuple(gradients[n : 2 * n]))
            for parameter, grad in zip(parameters, merged, strict=True):
                parameter.grad = grad

    def state_dict(self) -> dict[str, Any]:
        """The state needed to resume, except the arena's."""
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
        """Resume from :meth:`state_dict`.

        Raises:
            AttributeError, KeyError, RuntimeError, TypeError, ValueError: it is another learner's.
        """
        self.policy.load_state_dict(state["policy"])
        self.critic.load_state_dict(state["critic"])
        self.value_norm.load_state_dict(state["value_norm"])
        restore(self.actor_optimiser, state["actor_optimiser"], fixed=True)
        restore(self.critic_optimiser, state["critic_optimiser"], fixed=True)
        self.generator.set_state(state["generator"].cpu())
        self.order.set_state(state["order"].cpu())
