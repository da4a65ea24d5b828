"""
# Token Prune

| Import | `from tokenenv import token_prune_v0` |
|---|---|
| Creation | `pettingzoo.make("parallel", "tokenenv/TokenPrune-v0")` |
| Actions | Discrete |
| Parallel API | Yes |
| Agents | `agents = ["token_0", ..., "token_{P-1}"]`, one per image patch; 64 by default |
| Action Shape | () |
| Action Values | 0 (prune), 1 (keep) |
| Observation Shape | `(F + G,)` float32 |
| Observation Values | (-inf, inf) |
| State Shape | `(S,)` float32 |
| State Values | (-inf, inf) |

One image passes through a Vision Transformer. Before some of its blocks every visual token has an
agent that keeps or prunes it. The game itself, its observations, rewards and arguments are
described at {class}`tokenenv.envs.token_prune_gym.TokenPruneEnv`, the same game with a single
agent. This page describes only what differs with one agent per token.

### Observations

An agent observes its token's own features, followed by the features that all agents of the image
share. An agent whose token was pruned observes zeros, and so do all agents at the end of an
episode. `state()` is the image's state for a centralised critic: the class token, the progress,
and three numbers that agents do not observe: the dense model's probability of the true class, its
margin to the next class and its entropy. After the end it stays the state of the last decision.

### Episode end

All remaining agents terminate in the same step, the last decision; no agent is ever truncated.

### Arguments

These, and all arguments of {class}`tokenenv.envs.token_prune_gym.TokenPruneEnv`.

`on_prune`: what happens to the agent of a pruned token.

- `"mask"` (default): it stays in `agents` until the end. Its actions are ignored, and it keeps
  getting the rewards that the reward function gives it. Most learners expect a fixed set of agents.
- `"remove"`: in the step in which its token is pruned it gets its last observation, reward and
  `termination=True`, and is removed from `agents`. It then misses what a reward pays at the end to
  agents of tokens pruned earlier: `alpha_beta` and `keep_target` with `class_reward="each"` pay for
  every decision in which the token was kept, `cooperative` pays all agents.

`mask_in`: where the action mask is, int8 `(2,)`; the only legal action for a pruned token is 0. An
illegal action is not an error: it is ignored and counted.

- `"info"` (default): in `infos[agent]["action_mask"]`.
- `"obs"`: the observation is a `Dict` of `observation` and `action_mask`.
- `None`: the mask is left out.

### Infos

The same keys from reset on, numbers and arrays only.

| Key | Meaning | Range |
|---|---|---|
| `action_mask` | legal actions (with `mask_in="info"`) | int8 `(2,)` of 0 and 1 |
| `active_mask` | whether the agent's token is still there | bool |
| `illegal_actions` | its illegal actions in this episode | int from 0 |
| `tokens_left` | visual tokens of the image left | int in 0 to P |
| `correct` | whether the reduced model predicts the true class; False before the end | bool |
| `dense_correct` | whether the dense model predicts it; False before the end | bool |

### Example

```python
>>> from tokenenv import token_prune_v0
>>> env = token_prune_v0.parallel_env(max_cycles=2)
>>> observations, infos = env.reset(seed=0)
>>> len(env.agents), observations["token_0"].dtype, infos["token_0"]["action_mask"].tolist()
(64, dtype('float32'), [1, 1])
>>> while env.agents:
...     actions = {agent: env.action_space(agent).sample() for agent in env.agents}
...     observations, rewards, terminations, truncations, infos = env.step(actions)
>>> all(terminations.values())
True

```

### Version History

* v0: initial version
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
from gymnasium import spaces
from gymnasium.utils import EzPickle
from numpy.typing import NDArray
from pettingzoo import AECEnv, ParallelEnv
from pettingzoo.utils.conversions import parallel_to_aec_wrapper

from tokenenv.envs.cloning import separate
from tokenenv.envs.pettingzoo_base import OrderedEnv, SeededPlay
from tokenenv.envs.play import RENDER_MODES, check_by_agent, in_turn, open_play
from tokenenv.errors import UserError, check_choice

Seen: TypeAlias = NDArray[np.float32] | dict[str, NDArray[Any]]
"""One agent's observation: ``(F + G,)`` float32, or a dict of it and the action mask."""

OnPrune = Literal["mask", "remove"]
MaskIn = Literal["info", "obs"]


class TokenPruneParallelEnv(SeededPlay, ParallelEnv[str, Seen, int], EzPickle):
    """One agent per visual token of one image: keep or prune. See the module's page.

    Args:
        on_prune: whether the agent of a pruned token stays in ``agents`` or is removed.
        mask_in: where the action mask is.
        render_mode: ``human``, ``rgb_array``, ``ansi`` or None.
        **game: arguments of :func:`~tokenenv.game.build.build_game`.

    Raises:
        UserError: a value is unknown or contradicts another one.
    """

    metadata = {  # noqa: RUF012  (PettingZoo's own form)
        "name": "token_prune_v0",
        "render_modes": RENDER_MODES,
        "render_fps": 1,
        "is_parallelizable": True,
    }

    def __init__(
        self,
        *,
        on_prune: OnPrune = "mask",
        mask_in: MaskIn | None = "info",
        render_mode: str | None = None,
        **game: Any,
    ) -> None:
        EzPickle.__init__(self, on_prune=on_prune, mask_in=mask_in, render_mode=render_mode, **game)
        check_choice("on_prune", on_prune, ("mask", "remove"))
        check_choice("mask_in", mask_in, ("info", "obs", None))
        self.on_prune, self.mask_in, self.render_mode = on_prune, mask_in, render_mode
        also = ("on_prune", "mask_in", "render_mode")
        self._play = open_play("token_prune", render_mode, game, also=also)
        self.game = self._play.game
        self.max_cycles = self.game.steps
        self.possible_agents = [f"token_{i}" for i in range(self.game.agents)]
        self.agents: list[str] = []
        self._index = {agent: i for i, agent in enumerate(self.possible_agents)}
        self.action_spaces = {agent: spaces.Discrete(2) for agent in self.possible_agents}
        self.observation_spaces = {
            agent: self._one_observation_space() for agent in self.possible_agents
        }
        self.state_space = _box(self.game.state_dim)

    def observation_space(self, agent: str) -> spaces.Space[Any]:
        """What ``agent`` observes: a Box, or a Dict with the mask; the same for all agents."""
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> spaces.Discrete:
        """The actions of ``agent``: 0 prunes its token, 1 keeps it."""
        return self.action_spaces[agent]

    @in_turn
    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Seen], dict[str, dict[str, Any]]]:
        """Start with the next image, or with the one that ``options`` name.

        Args:
            seed: restarts the order of the images.
            options: ``index``, ``label`` or ``file`` of an image, see
                :func:`~tokenenv.envs.chosen.chosen_batch`.

        Raises:
            UserError: a negative seed, or options that name no image.
        """
        self._seed(seed)
        observation = self._play.reset(options)[0].cpu().numpy()
        self.agents = list(self.possible_agents)
        return self._reports(observation)

    @in_turn
    def step(
        self, actions: dict[str, int]
    ) -> tuple[
        dict[str, Seen],
        dict[str, float],
        dict[str, bool],
        dict[str, bool],
        dict[str, dict[str, Any]],
    ]:
        """Play one decision of all agents.

        Args:
            actions: one for each agent whose token is still there. Those of pruned tokens and of
                unknown agents are ignored.

        Returns:
            Observations, rewards, terminations, truncations and infos of the agents that were in
            :attr:`agents`; empty once the episode has ended.

        Raises:
            UserError: an action is missing or neither 0 nor 1, or no episode was started.
        """
        if self.game.episode is not None and not self.agents:
            return {}, {}, {}, {}, {}
        observation, reward, over = self._play.step([self._joint_action(actions)])
        observations, infos = self._reports(observation[0].cpu().numpy())
        each = reward[0].expand(len(self.possible_agents))
        rewards = dict(zip(self.possible_agents, each.tolist(), strict=True))
        leaves = self.on_prune == "remove"
        terminations = {
            agent: over or (leaves and not infos[agent]["active_mask"]) for agent in self.agents
        }
        acted = self.agents
        self.agents = [agent for agent in acted if not terminations[agent]]
        return (
            observations,
            {agent: rewards[agent] for agent in acted},
            terminations,
            dict.fromkeys(acted, False),
            infos,
        )

    def state(self) -> NDArray[np.float32]:
        """``(S,)`` the image's state at the next decision; after the end, at the last one."""
        return self._play.state[0].cpu().numpy()

    def render(self) -> NDArray[np.uint8] | str | None:
        """The image with its pruned tokens, in the form of the render mode."""
        return self._play.draw()

    def _one_observation_space(self) -> spaces.Space[Any]:
        observation = _box(self._play.width)
        if self.mask_in != "obs":
            return observation
        mask = spaces.Box(0, 1, (2,), np.int8)
        return spaces.Dict({"observation": observation, "action_mask": mask})

    def _joint_action(self, actions: dict[str, int]) -> list[Any]:
        check_by_agent(actions)
        joint: list[Any] = [0] * self.game.agents
        active = self._play.active[0].tolist() if self.agents else joint
        for agent in self.agents:
            i = self._index[agent]
            if agent in actions:
                joint[i] = actions[agent]
            elif active[i]:
                raise UserError(f"no action for '{agent}': give one for every agent in env.agents")
        return joint

    def _reports(
        self, observation: NDArray[np.float32]
    ) -> tuple[dict[str, Seen], dict[str, dict[str, Any]]]:
        """Observations and infos of :attr:`agents`, from ``(P, F + G)``."""
        play = self._play
        active = play.active[0].cpu().numpy()
        masks = play.legal[0].cpu().numpy().astype(np.int8)
        illegal = play.illegal[0].tolist()
        whole_image = {
            "tokens_left": int(active.sum()),
            "correct": bool(play.correct[0]),
            "dense_correct": bool(play.dense_correct[0]),
        }
        observations: dict[str, Seen] = {}
        infos: dict[str, dict[str, Any]] = {}
        for agent in self.agents:
            i = self._index[agent]
            observations[agent] = observation[i]
            infos[agent] = {
                "active_mask": bool(active[i]),
                "illegal_actions": illegal[i],
                **whole_image,
            }
            if self.mask_in == "info":
                infos[agent]["action_mask"] = masks[i]
            elif self.mask_in == "obs":
                observations[agent] = {"observation": observation[i], "action_mask": masks[i]}
        return observations, infos


def _box(width: int) -> spaces.Box:
    return spaces.Box(-np.inf, np.inf, (width,), np.float32)


def parallel_env(**kwargs: Any) -> TokenPruneParallelEnv:
    """Make the parallel env, with the arguments of :class:`TokenPruneParallelEnv`."""
    return TokenPruneParallelEnv(**kwargs)


class TokenPruneAECEnv(parallel_to_aec_wrapper, EzPickle):
    """The same with the agents in turn; the decision is played when all have chosen.

    Args:
        **kwargs: as for :class:`TokenPruneParallelEnv`.
    """

    def __init__(self, **kwargs: Any) -> None:
        EzPickle.__init__(self, **kwargs)
        super().__init__(parallel_env(**kwargs))
        self.agents: list[str] = []

    def clone(self) -> TokenPruneAECEnv:
        """As :meth:`tokenenv.envs.cloning.Clonable.clone`."""
        return separate(self)


def raw_env(**kwargs: Any) -> AECEnv[str, Any, Any]:
    """Make the AEC env without PettingZoo's usual wrappers."""
    return TokenPruneAECEnv(**kwargs)


def env(**kwargs: Any) -> AECEnv[str, Any, Any]:
    """Make the AEC env with PettingZoo's usual wrappers."""
    return OrderedEnv(raw_env(**kwargs))
