"""
# Layer Merge, Layer Prune

| Import | `from tokenenv import layer_merge_v0`, `layer_prune_v0` |
|---|---|
| Creation | `pettingzoo.make("aec", "tokenenv/LayerMerge-v0")`, `"tokenenv/LayerPrune-v0"` |
| Actions | Discrete |
| Parallel API | Yes |
| Agents | `agents = ["layer_0", ..., "layer_{K-1}"]`, one per decision; 12 by default |
| Action Shape | () |
| Action Values | 0 (remove nothing) to n - 1 |
| Observation Shape | `(F + G,)` float32 |
| Observation Values | (-inf, inf) |
| State Shape | `(S,)` float32 |
| State Values | (-inf, inf) |

One image passes through a Vision Transformer. In every block one agent chooses how many tokens
are merged or pruned. The games themselves, their observations, rewards and arguments are
described at {class}`tokenenv.envs.layer_merge_gym.LayerMergeEnv` and
{class}`tokenenv.envs.layer_prune_gym.LayerPruneEnv`, where one agent decides in all blocks. This
page describes only what differs with one agent per block.

### Turns

The agents act in the order of the blocks, `layer_i` in decision block `i`.

- AEC (`env`, `raw_env`): each agent acts once, so an episode has as many steps as agents. Every
  step runs the image through further blocks, so the metadata say `is_parallelizable: False`.
- Parallel (`parallel_env`): `max_cycles` cycles, as many as agents. In cycle `i` only the action of
  `layer_i` has an effect. The only legal action of the others is 0, and it may be left out.

### Observations

The agent whose turn it is observes its block. The others observe zeros, and so do all agents at
the end. `state()` is the image's state for a centralised critic: the class token, which decision
it is, the history of removals, and three numbers that agents do not observe: the dense model's
probability of the true class, its margin to the next class and its entropy. After the end it stays
the state of the last decision.

### Rewards

An agent gets the reward of its own block in the step in which it acts, and 0 in all others.

### Episode end

All agents terminate together, after the last decision; no agent is ever truncated.

### Arguments

These, and all arguments of the Gymnasium environments except `action`, which is always `"count"`.

`mask_in`: where the action mask is, int8 `(n,)`. An illegal action is not an error: it is replaced
by 0 and counted.

- `"info"` (default): in `infos[agent]["action_mask"]`.
- `"obs"`: the observation is a `Dict` of `observation` and `action_mask`.
- `None`: the mask is left out.

### Infos

The same keys from reset on, numbers and arrays only.

| Key | Meaning | Range |
|---|---|---|
| `action_mask` | legal actions (with `mask_in="info"`) | int8 `(n,)` of 0 and 1 |
| `active_mask` | whether it is the agent's turn | bool |
| `illegal_actions` | its illegal actions in this episode | int from 0 |
| `tokens_left` | visual tokens of the image left | int in 0 to P |
| `correct` | whether the reduced model predicts the true class; False before the end | bool |
| `dense_correct` | whether the dense model predicts it; False before the end | bool |

### Example

```python
>>> from tokenenv import layer_prune_v0
>>> env = layer_prune_v0.env(max_cycles=3)
>>> env.reset(seed=0)
>>> for agent in env.agent_iter():
...     observation, reward, termination, truncation, info = env.last()
...     env.step(None if termination else 2)
...     print(agent, info["tokens_left"], termination)
layer_0 64 False
layer_1 60 False
layer_2 56 False
layer_0 52 True
layer_1 52 True
layer_2 52 True

```

### Version History

* v0: initial version
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces
from gymnasium.utils import EzPickle
from numpy.typing import NDArray
from pettingzoo import AECEnv, ParallelEnv

from tokenenv.envs.pettingzoo_base import SeededPlay
from tokenenv.envs.play import (
    RENDER_MODES,
    check_by_agent,
    in_turn,
    one_choice,
    open_play,
)
from tokenenv.envs.token_prune_pettingzoo import MaskIn, Seen
from tokenenv.errors import UserError, check_choice


class _BlockAgents(SeededPlay, EzPickle):
    """What the AEC and the parallel environment share: agents, spaces, observations and infos.

    Args:
        mask_in: where the action mask is.
        render_mode: ``human``, ``rgb_array``, ``ansi`` or None.
        **game: arguments of :func:`~tokenenv.game.build.build_game`.

    Raises:
        UserError: a value is unknown or contradicts another one.
    """

    rules: ClassVar[str]
    agents: list[str]
    possible_agents: list[str]

    def __init__(
        self, *, mask_in: MaskIn | None = "info", render_mode: str | None = None, **game: Any
    ) -> None:
        EzPickle.__init__(self, mask_in=mask_in, render_mode=render_mode, **game)
        check_choice("mask_in", mask_in, ("info", "obs", None))
        if game.get("action", "count") != "count":
            raise UserError(
                f"action={game['action']!r}: agents of PettingZoo choose a 'count'; "
                "gymnasium.make takes the other"
            )
        self.mask_in, self.render_mode = mask_in, render_mode
        self._play = open_play(self.rules, render_mode, game, also=("mask_in", "render_mode"))
        self.game = self._play.game
        self.max_cycles = self.game.steps
        self.possible_agents = [f"layer_{i}" for i in range(self.game.steps)]
        self.agents = []
        self.action_spaces = {
            agent: spaces.Discrete(self.game.actions) for agent in self.possible_agents
        }
        self.observation_spaces = {
            agent: self._one_observation_space() for agent in self.possible_agents
        }
        self.state_space = spaces.Box(-np.inf, np.inf, (self.game.state_dim,), np.float32)
        self._turn = 0
        self._view = np.zeros(self._play.width, np.float32)
        self._illegal: dict[str, int] = {}

    def observation_space(self, agent: str) -> spaces.Space[Any]:
        """What ``agent`` observes: a Box, or a Dict with the mask; the same for all agents."""
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> spaces.Discrete:
        """The actions of ``agent``: 0 removes nothing, and the larger the value the more."""
        return self.action_spaces[agent]

    def state(self) -> NDArray[np.float32]:
        """``(S,)`` the image's state at the next decision; after the end, at the last one."""
        return self._play.state[0].cpu().numpy()

    def render(self) -> NDArray[np.uint8] | str | None:
        """The image with its tokens after each decision, in the form of the render mode."""
        return self._play.draw()

    def _one_observation_space(self) -> spaces.Space[Any]:
        if self.mask_in != "obs":
            return self._play.observation_space
        mask = spaces.Box(0, 1, (self.game.actions,), np.int8)
        return spaces.Dict({"observation": self._play.observation_space, "action_mask": mask})

    def _start(self, seed: int | None, options: dict[str, Any] | None) -> None:
        self._seed(seed)
        self._view = self._play.reset(options)[0].cpu().numpy()
        self.agents = list(self.possible_agents)
        self._turn = 0
        self._illegal = dict.fromkeys(self.agents, 0)

    def _decide(self, actions: dict[str, Any]) -> tuple[float, bool]:
        """Play the decision that is due; returns its reward and whether the episode has ended."""
        if not self.agents or self._turn == self.game.steps:
            raise UserError("no episode is running: call reset() first")
        check_by_agent(actions)
        agent = self.possible_agents[self._turn]
        if agent not in actions:
            raise UserError(f"no action for '{agent}': it is its turn")
        given: dict[str, int] = {}
        for name in self.agents:
            if name not in actions:
                continue
            chosen = one_choice(actions[name], self.game.actions)
            if chosen is None:
                raise UserError(
                    f"action {actions[name]!r} of '{name}' is out of range: choose 0 to "
                    f"{self.game.actions - 1}"
                )
            given[name] = chosen
        for name, chosen in given.items():
            self._illegal[name] += int(not self._mask(name)[chosen])
        observation, reward, over = self._play.step([given[agent]])
        self._view = observation[0].cpu().numpy()
        self._turn += 1
        return float(reward[0].sum()), over

    def _acts(self, agent: str) -> bool:
        return self._turn < self.game.steps and agent == self.possible_agents[self._turn]

    def _mask(self, agent: str) -> NDArray[np.int8]:
        if self._acts(agent):
            return self._play.legal[0, 0].cpu().numpy().astype(np.int8)
        return (np.arange(self.game.actions) == 0).astype(np.int8)

    def _observation(self, agent: str) -> Seen:
        view = self._view.copy() if self._acts(agent) else np.zeros_like(self._view)
        if self.mask_in != "obs":
            return view
        return {"observation": view, "action_mask": self._mask(agent)}

    def _infos(self) -> dict[str, dict[str, Any]]:
        play = self._play
        whole_image = {
            "tokens_left": int(play.tokens_left[0]),
            "correct": bool(play.correct[0]),
            "dense_correct": bool(play.dense_correct[0]),
        }
        infos: dict[str, dict[str, Any]] = {}
        for agent in self.agents:
            infos[agent] = {
                "active_mask": self._acts(agent),
                "illegal_actions": self._illegal[agent],
                **whole_image,
            }
            if self.mask_in == "info":
                infos[agent]["action_mask"] = self._mask(agent)
        return infos


class _LayerAECEnv(_BlockAgents, AECEnv[str, Any, Any]):
    """One agent per block of one image, in turn. See the module's page."""

    def __init__(self, **kwargs: Any) -> None:
        AECEnv.__init__(self)
        _BlockAgents.__init__(self, **kwargs)

    @in_turn
    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> None:
        """Start with the next image, or with the one that ``options`` name.

        Args:
            seed: restarts the order of the images.
            options: ``index``, ``label`` or ``file`` of an image, see
                :func:`~tokenenv.envs.chosen.chosen_batch`.

        Raises:
            UserError: a negative seed, or options that name no image.
        """
        self._start(seed, options)
        self.rewards = dict.fromkeys(self.agents, 0.0)
        self._cumulative_rewards = dict.fromkeys(self.agents, 0.0)
        self.terminations = dict.fromkeys(self.agents, False)
        self.truncations = dict.fromkeys(self.agents, False)
        self.infos = self._infos()
        self.agent_selection = self.agents[0]

    def observe(self, agent: str) -> Seen:
        """What ``agent`` observes: its block if it is its turn, else zeros."""
        return self._observation(agent)

    @in_turn
    def step(self, action: Any) -> None:
        """Play the decision of the agent whose turn it is; None for one that has terminated.

        Raises:
            UserError: the action is out of range, or no episode was started.
        """
        if self.agents and self.terminations[self.agent_selection]:
            self._was_dead_step(action)
            return
        agent = self.possible_agents[self._turn % self.game.steps]
        reward, over = self._decide({agent: action})
        self._clear_rewards()
        self._cumulative_rewards[agent] = 0.0
        self.rewards[agent] = reward
        self._accumulate_rewards()
        self.terminations = dict.fromkeys(self.agents, over)
        self.infos = self._infos()
        self.agent_selection = self.agents[self._turn % self.game.steps]


class _LayerParallelEnv(_BlockAgents, ParallelEnv[str, Any, Any]):
    """One agent per block of one image; one of them acts in each cycle. See the module's page."""

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
        self._start(seed, options)
        return {agent: self._observation(agent) for agent in self.agents}, self._infos()

    @in_turn
    def step(
        self, actions: dict[str, Any]
    ) -> tuple[
        dict[str, Seen],
        dict[str, float],
        dict[str, bool],
        dict[str, bool],
        dict[str, dict[str, Any]],
    ]:
        """Play the decision of the agent whose turn it is.

        Args:
            actions: at least that agent's. Those of all others are ignored; of the environment's
                own agents, any other than 0 is counted as illegal.

        Returns:
            Observations, rewards, terminations, truncations and infos of all agents; empty once
            the episode has ended.

        Raises:
            UserError: the action is missing or out of range, or no episode was started.
        """
        if self.game.episode is not None and not self.agents:
            return {}, {}, {}, {}, {}
        turn = self._turn
        reward, over = self._decide(actions)
        acted = self.agents
        rewards = dict.fromkeys(acted, 0.0) | {self.possible_agents[turn]: reward}
        observations, infos = {agent: self._observation(agent) for agent in acted}, self._infos()
        if over:
            self.agents = []
        return (
            observations,
            rewards,
            dict.fromkeys(acted, over),
            dict.fromkeys(acted, False),
            infos,
        )


def _metadata(name: str, parallelizable: bool) -> dict[str, Any]:
    return {
        "name": name,
        "render_modes": RENDER_MODES,
        "render_fps": 1,
        "is_parallelizable": parallelizable,
    }


class LayerMergeAECEnv(_LayerAECEnv):
    """Merging, one agent per block, in turn. See the module's page."""

    rules: ClassVar[str] = "layer_merge"
    metadata: ClassVar[dict[str, Any]] = _metadata("layer_merge_v0", False)


class LayerPruneAECEnv(_LayerAECEnv):
    """Pruning, one agent per block, in turn. See the module's page."""

    rules: ClassVar[str] = "layer_prune"
    metadata: ClassVar[dict[str, Any]] = _metadata("layer_prune_v0", False)


class LayerMergeParallelEnv(_LayerParallelEnv):
    """Merging, one agent per block, one of them in each cycle. See the module's page."""

    rules: ClassVar[str] = "layer_merge"
    metadata: ClassVar[dict[str, Any]] = _metadata("layer_merge_v0", True)


class LayerPruneParallelEnv(_LayerParallelEnv):
    """Pruning, one agent per block, one of them in each cycle. See the module's page."""

    rules: ClassVar[str] = "layer_prune"
    metadata: ClassVar[dict[str, Any]] = _metadata("layer_prune_v0", True)
