"""The games as TorchRL environments: one batched game on tensors, for TorchRL and BenchMARL.

Needs ``pip install 'tokenenv[torchrl]'`` or ``'tokenenv[benchmarl]'``.
"""

from __future__ import annotations

import secrets
from typing import Any

import torch
from torch import Tensor

from tokenenv.envs import ids
from tokenenv.envs.cloning import Clonable
from tokenenv.envs.play import in_turn, open_play
from tokenenv.errors import UserError

try:
    from tensordict import TensorDict, TensorDictBase
    from torchrl.data import Categorical, Composite, Unbounded
    from torchrl.envs import EnvBase
except ImportError as error:
    raise UserError("TorchRL is not installed: pip install 'tokenenv[torchrl]'") from error

GROUP = "agents"
"""The group of all agents, as TorchRL's multi-agent environments name it."""


class TorchRLEnv(Clonable, EnvBase):
    """A batched game of ``B`` images with ``A`` agents each, as a TorchRL environment.

    All tensors stay on the game's device. The number of agents is fixed: an agent that may no
    longer act observes zeros, and its only legal action is 0. An illegal action is replaced by 0
    and counted. With ``action="count"`` ``A`` is 1.

    - ``("agents", "observation")``: ``(B, A, F + G)`` float32, what an agent observes; zeros at the
      end
    - ``("agents", "action_mask")``: ``(B, A, n)`` bool, which of the ``n`` actions are legal
    - ``("agents", "active_mask")``: ``(B, A)`` bool, whether the agent may act; at the end False,
      but in ``TokenPrune-v0`` whether its token is left
    - ``("agents", "action")``: ``(B, A)`` int64, 0 to ``n - 1``
    - ``("agents", "reward")``: ``(B, A, 1)`` float32, the agent's reward
    - ``"state"``: ``(B, S)`` float32, the image's state, for a centralised critic; at the end that
      of the last decision
    - ``("info", "tokens_left")``: ``(B, 1)`` int64, visual tokens left
    - ``("info", "illegal_actions")``: ``(B, 1)`` int64, illegal actions in this episode
    - ``("info", "correct")``, ``("info", "dense_correct")``: ``(B, 1)`` bool, whether the reduced
      and the dense model predict the true class; False before the end
    - ``"done"``, ``"terminated"``, ``"truncated"``, also under ``"agents"``: ``(B, 1)``,
      ``(B, A, 1)`` bool; all images and agents terminate together, nothing is truncated

    Args:
        id: a registered id, such as ``tokenenv/TokenPrune-v0``.
        num_envs: number of images B in one batch.
        **game: arguments of :func:`~tokenenv.game.build.build_game`.

    Raises:
        UserError: TorchRL is not installed, or a value is unknown or contradicts another one.

    Example:
        >>> from torchrl.envs.utils import check_env_specs
        >>> from tokenenv.envs.torchrl import TorchRLEnv
        >>> env = TorchRLEnv("tokenenv/TokenPrune-v0", num_envs=4)
        >>> check_env_specs(env)
        >>> env.rollout(3)["next", "agents", "reward"].shape
        torch.Size([4, 3, 64, 1])
    """

    def __init__(self, id: str, num_envs: int = 1, **game: Any) -> None:
        play = open_play(ids.vector_class(id).rules, None, game, num_envs, ("num_envs",))
        super().__init__(device=play.game.backbone.device, batch_size=torch.Size([num_envs]))
        self.game, self._play = play.game, play
        self.group_map = {GROUP: [f"agent_{i}" for i in range(self.game.agents)]}
        one, each = (num_envs, 1), (num_envs, self.game.agents)
        ends = ("done", "terminated", "truncated")
        agents = {
            "observation": self._numbers(*each, play.width),
            "action_mask": self._flags(*each, self.game.actions),
            "active_mask": self._flags(*each),
        }
        info = {
            "tokens_left": self._counts(*one),
            "illegal_actions": self._counts(*one),
            "correct": self._flags(*one),
            "dense_correct": self._flags(*one),
        }
        self.observation_spec = self._of_images(
            {
                GROUP: self._of_agents(agents),
                "state": self._numbers(num_envs, self.game.state_dim),
                "info": self._of_images(info),
            }
        )
        action = Categorical(self.game.actions, shape=torch.Size(each), device=self.device)
        self.action_spec = self._of_images({GROUP: self._of_agents({"action": action})})
        reward = self._of_agents({"reward": self._numbers(*each, 1)})
        self.reward_spec = self._of_images({GROUP: reward})
        self.done_spec = self._of_images(
            {
                GROUP: self._of_agents({name: self._flags(*each, 1) for name in ends}),
                **{name: self._flags(*one) for name in ends},
            }
        )

    def to(self, device: Any) -> TorchRLEnv:
        """The environment itself, if it is on ``device`` already.

        Raises:
            UserError: it is on another device. It can't move: environments may share the model.
        """
        if torch.empty(0, device=device).device != self._play.game.backbone.device:
            raise UserError(
                f"device '{device}' is not the game's {self.device}: give device= at creation"
            )
        return self

    @in_turn
    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDict:
        wanted = None if tensordict is None else tensordict.get("_reset", None)
        # Values are checked on a CPU only: reading them would synchronise with an accelerator.
        if wanted is not None and wanted.device.type == "cpu" and not wanted.all():
            raise UserError(
                "some images can't be reset without the others: all of a batch end together"
            )
        if self._play.needs_seed:
            self._set_seed(secrets.randbits(31))
        return self._out(self._play.reset(), over=False)

    @in_turn
    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        action = tensordict.get((GROUP, "action"))
        play = self._play
        observation, reward, over = play.step(action[:, 0] if play.by_count else action)
        seen = self._out(observation, over)
        rewards = reward.expand(-1, self.game.agents)[..., None].clone()
        return seen.set((GROUP, "reward"), rewards)

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self._play.seed(seed)

    def _out(self, observation: Tensor, over: bool) -> TensorDict:
        play, batch = self._play, self.batch_size
        per_agent = (*batch, self.game.agents)
        flags = {"done": over, "terminated": over, "truncated": False}

        def ends(*shape: int) -> dict[str, Tensor]:
            return {
                name: torch.full(shape, value, device=self.device) for name, value in flags.items()
            }

        agents = {
            "observation": observation.reshape(*per_agent, play.width),
            "action_mask": play.legal,
            "active_mask": play.active,
            **ends(*per_agent, 1),
        }
        info = {
            "tokens_left": play.tokens_left[:, None],
            "illegal_actions": play.illegal.sum(1, keepdim=True),
            "correct": play.correct[:, None],
            "dense_correct": play.dense_correct[:, None],
        }
        return TensorDict(
            {
                GROUP: TensorDict(agents, per_agent),
                "state": play.state,
                "info": TensorDict(info, batch),
                **ends(*batch, 1),
            },
            batch,
            device=self.device,
        )

    def _of_images(self, specs: dict[str, Any]) -> Composite:
        return Composite(specs, shape=self.batch_size, device=self.device)

    def _of_agents(self, specs: dict[str, Any]) -> Composite:
        shape = torch.Size([*self.batch_size, self.game.agents])
        return Composite(specs, shape=shape, device=self.device)

    def _numbers(self, *shape: int) -> Unbounded:
        return Unbounded(torch.Size(shape), device=self.device, dtype=torch.float32)

    def _counts(self, *shape: int) -> Unbounded:
        return Unbounded(torch.Size(shape), device=self.device, dtype=torch.int64)

    def _flags(self, *shape: int) -> Categorical:
        return Categorical(2, shape=torch.Size(shape), device=self.device, dtype=torch.bool)
