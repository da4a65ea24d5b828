"""The interface of games for learners: the tensor game, or adapted PettingZoo environments."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from tokenenv.errors import UserError
from tokenenv.game.rules import Observation


class Step(Protocol):
    """What a step of an arena returns.

    ``observation`` is None when all episodes have ended and the arena must be reset; ``reward`` is
    ``(B, A)`` or ``(B, 1)``; ``done`` is ``(B,)`` bool. If a time limit can end episodes, it also
    has ``cut``, see :class:`PettingZooStep`.
    """

    @property
    def observation(self) -> Observation | None: ...  # noqa: D102
    @property
    def reward(self) -> Tensor: ...  # noqa: D102
    @property
    def done(self) -> Tensor: ...  # noqa: D102


class Arena(Protocol):
    """``B`` copies of a game with ``A`` agents each, in tensors. ``tokenenv.game.Game`` is one."""

    batch_size: int
    agents: int
    actions: int
    agent_dim: int
    shared_dim: int
    state_dim: int

    def reset(self) -> Observation:
        """Reset every copy."""

    def step(self, action: Tensor) -> Step:
        """Play ``action (B, A)`` integers in every copy."""


@dataclass(frozen=True)
class PettingZooStep:
    """A :class:`Step` of :class:`PettingZooArena`.

    Attributes:
        observation: the next observation; the first of a new episode where ``done``.
        reward: ``(B, A)``.
        done: ``(B,)`` bool, whether the episode has ended.
        cut: the last observation of agents that were truncated in this step, which are its
            ``active`` ones; a learner bootstraps from it. None if no agent was truncated.
    """

    observation: Observation
    reward: Tensor
    done: Tensor
    cut: Observation | None = None


class PettingZooArena:
    """Several copies of any PettingZoo parallel environment as one :class:`Arena`.

    An agent that is no longer in ``env.agents`` becomes inactive and observes zeros. Agents whose
    info has ``active_mask=False`` are inactive, too, and an info's ``action_mask`` holds the legal
    actions; this project's games have both. A copy whose agents are all gone is reset in the same
    step (its ``done`` is True). The critic's state is ``env.state()`` if the environment has one,
    else all agents' observations concatenated. Copies get seeds ``seed``, ``seed + 1`` ...

    Args:
        make_env: builds one environment; all agents must have the same Box observation and
            Discrete action space.
        copies: number B of environments.
        seed: seed of the first copy.
        device: device of the tensors.

    Raises:
        UserError: agents have other spaces, or different ones.
    """

    def __init__(
        self, make_env: Callable[[], Any], copies: int, seed: int = 0, device: str = "cpu"
    ) -> None:
        self.envs = [make_env() for _ in range(copies)]
        self.names: list[str] = list(self.envs[0].possible_agents)
        first = self.names[0]
        space, actions = self.envs[0].observation_space(first), self.envs[0].action_space(first)
        for name in self.names:
            if self.envs[0].observation_space(name) != space or not isinstance(space, spaces.Box):
                raise UserError(f"agent '{name}' needs the same Box observation space as '{first}'")
            if self.envs[0].action_space(name) != actions or not isinstance(
                actions, spaces.Discrete
            ):
                raise UserError(f"agent '{name}' needs the same Discrete action space as '{first}'")
        self.batch_size, self.agents, self.actions = copies, len(self.names), int(actions.n)
        self.agent_dim = int(np.prod(space.shape))
        self.shared_dim = 0
        self._layout = {"observation": slice(0, self.agent_dim)}
        self._seeds: Sequence[int | None] = [seed + i for i in range(copies)]
        self._device, self._first_action = torch.device(device), int(actions.start)
        self._has_state = hasattr(self.envs[0], "state_space")
        self.state_dim = (
            int(np.prod(self.envs[0].state_space.shape))
            if self._has_state
            else self.agents * self.agent_dim
        )

    def reset(self) -> Observation:
        """Reset every copy; only the first reset uses the seeds."""
        starts = [env.reset(seed=seed) for env, seed in zip(self.envs, self._seeds, strict=True)]
        self._seen, self._infos = map(list, zip(*starts, strict=True))
        self._seeds = [None] * len(self.envs)
        return self._observe()

    def step(self, action: Tensor) -> PettingZooStep:
        """Play ``action (B, A)`` integers in every copy."""
        rewards = np.zeros((self.batch_size, self.agents), np.float32)
        done = np.zeros(self.batch_size, bool)
        moves = action.cpu().numpy() + self._first_action
        last: list[dict[str, Any]] = [{} for _ in self.envs]
        truncated: list[set[str]] = [set() for _ in self.envs]
        state = np.zeros((self.batch_size, self.state_dim), np.float32)
        for i, env in enumerate(self.envs):
            present = set(env.agents)
            chosen = {n: int(moves[i, j]) for j, n in enumerate(self.names) if n in present}
            seen, reward, ended, cut_off, self._infos[i] = env.step(chosen)
            rewards[i] = [reward.get(n, 0.0) for n in self.names]
            self._seen[i] = {n: seen[n] for n in env.agents}
            truncated[i] = {n for n in present if cut_off[n] and not ended[n]}
            if truncated[i]:
                last[i] = seen
                if self._has_state:
                    state[i] = np.asarray(env.state(), np.float32).reshape(-1)
            if not env.agents:
                done[i] = True
                self._seen[i], self._infos[i] = env.reset()
        cut = None
        if any(truncated):
            cut = self._frame(last, truncated, state if self._has_state else None)
        return PettingZooStep(self._observe(), self._there(rewards), self._there(done), cut)

    def _observe(self) -> Observation:
        state = None
        if self._has_state:
            state = np.stack([np.asarray(e.state(), np.float32).reshape(-1) for e in self.envs])
        acting = [
            {name for name in seen if info.get(name, {}).get("active_mask", True)}
            for seen, info in zip(self._seen, self._infos, strict=True)
        ]
        return self._frame(self._seen, acting, state, self._legal())

    def _legal(self) -> Tensor | None:
        """``(B, A, actions)`` bool legal actions from the infos; None if these have no masks."""
        if not any("action_mask" in told for info in self._infos for told in info.values()):
            return None
        legal = np.ones((self.batch_size, self.agents, self.actions), bool)
        for i, info in enumerate(self._infos):
            for j, name in enumerate(self.names):
                legal[i, j] = info.get(name, {}).get("action_mask", True)
        return self._there(legal)

    def _there(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._device)

    def _frame(
        self,
        views: list[dict[str, Any]],
        acting: Sequence[Container[str]],
        state: np.ndarray | None,
        legal: Tensor | None = None,
    ) -> Observation:
        """The observations of all copies' agents as tensors; agents in ``acting`` are active."""
        own = np.zeros((self.batch_size, self.agents, self.agent_dim), np.float32)
        active = np.zeros((self.batch_size, self.agents), bool)
        for i, seen in enumerate(views):
            for j, name in enumerate(self.names):
                if name in seen:
                    own[i, j] = np.asarray(seen[name], np.float32).reshape(-1)
                active[i, j] = name in acting[i]
        if state is None:
            state = own.reshape(self.batch_size, -1)
        return Observation(
            agents=self._there(own),
            shared=torch.zeros(self.batch_size, 0, device=self._device),
            active=self._there(active),
            step=0,
            layout=self._layout,
            legal=legal,
            state=self._there(state),
        )
