"""A policy that stable-baselines3 or sb3-contrib trained on a per-block game, for evaluation."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor, nn

from tokenenv.errors import UserError
from tokenenv.game import Game
from tokenenv.game.cost import linear_macs
from tokenenv.game.policy import Policy
from tokenenv.game.rules import Observation


class SB3Policy(Policy):
    """A trained ``MlpPolicy`` that chooses counts, as a policy for evaluation.

    Actions are deterministic. As in the environments, an illegal action is replaced by 0; learners
    that take masks, such as MaskablePPO, get them.

    A saved learner does not record whether ``VecNormalize`` scaled its observations, nor the counts
    its actions stand for. For a learner loaded without its environment only shapes are checked.

    Args:
        learner: trained on ``tokenenv/LayerMerge-v0`` or ``tokenenv/LayerPrune-v0``.
        game: the game it was trained on, ``env.unwrapped.game``, or ``envs.envs.game`` of an
            :class:`~tokenenv.envs.sb3.SB3VecEnv`.

    Raises:
        UserError: its spaces or rules are not those of the game, its observations were scaled, or
            its network is not a multilayer perceptron.

    Example:
        >>> from stable_baselines3 import PPO
        >>> from tokenenv import open_source
        >>> from tokenenv.measure import evaluate
        >>> from tokenenv.envs.sb3 import SB3VecEnv
        >>> envs = SB3VecEnv("tokenenv/LayerMerge-v0", num_envs=8)
        >>> game = envs.envs.game
        >>> learner = PPO("MlpPolicy", envs, n_steps=12, batch_size=96, device="cpu").learn(96)
        >>> images = open_source("digits", game.backbone.model, split="test", limit=8)
        >>> found = evaluate(game.backbone, SB3Policy(learner, game), images)
        >>> found.report()["images"]
        8
    """

    def __init__(self, learner: Any, game: Game) -> None:
        rules = game.rules
        if not rules.by_count:
            raise UserError(
                f"{type(rules).__name__} asks every token and not for a count: "
                "give a game of tokenenv/LayerMerge-v0 or tokenenv/LayerPrune-v0"
            )
        width = game.agent_dim + game.shared_dim
        seen, acts = learner.observation_space, learner.action_space
        if not (isinstance(seen, spaces.Box) and seen.shape == (width,)):
            raise UserError(
                f"the learner observes {seen} and the game shows ({width},) numbers: "
                "give the game that it was trained on"
            )
        if not (isinstance(acts, spaces.Discrete) and acts.n == game.actions):
            raise UserError(
                f"the learner chooses from {acts} and the game takes Discrete({game.actions}): "
                "give the game that it was trained on"
            )
        played = _game_of(learner)
        if played is not None and played.rules != rules:
            raise UserError(
                f"the learner was trained with {played.rules} and the game has {rules}: "
                "give the game that it was trained on"
            )
        normalised = learner.get_vec_normalize_env()
        if normalised is not None and normalised.norm_obs:
            raise UserError(
                "the learner saw observations that VecNormalize scaled, which the game does not "
                "show: train it without, or with norm_obs=False"
            )
        self.rules, self._learner = rules, learner
        self.trained_on = game.backbone.architecture
        self._macs = linear_macs(*_acting(learner.policy))
        self._masks = "action_masks" in inspect.signature(learner.predict).parameters

    def act(self, observation: Observation) -> Tensor:
        """``(B, 1)`` int64 counts' indices."""
        assert observation.legal is not None
        legal = observation.legal[:, 0]
        seen = torch.cat([observation.agents[:, 0], observation.shared], dim=1).float()
        masks = {"action_masks": legal.cpu().numpy()} if self._masks else {}
        chosen, _ = self._learner.predict(seen.cpu().numpy(), deterministic=True, **masks)
        action = torch.as_tensor(chosen, device=legal.device).long()[:, None]
        return torch.where(legal.gather(1, action), action, 0)

    def __deepcopy__(self, memo: dict[int, Any]) -> SB3Policy:
        """Itself: it has no state of its own, and torch can't copy a learner in training."""
        return self

    def macs(self, agents: Tensor, removed: Tensor) -> Tensor:
        """Multiply-adds of one decision, see :meth:`tokenenv.Policy.macs`."""
        return torch.full_like(agents, self._macs)


def _acting(policy: Any) -> tuple[nn.Module, ...]:
    """The parts of a policy that choose actions: an actor's, or DQN's network of action values.

    Raises:
        UserError: it is no multilayer perceptron, or has memory.
    """
    values = getattr(policy, "q_net", None)
    network: Any = getattr(policy, "mlp_extractor", None)
    extractor = policy.features_extractor if values is None else values.features_extractor
    known = (values is not None or network is not None) and not hasattr(policy, "lstm_actor")
    if not known or list(extractor.parameters()):
        raise UserError(
            f"the cost of {type(policy).__name__} is not known: train 'MlpPolicy' "
            "with an algorithm that has no memory, such as PPO, A2C or DQN"
        )
    return (values.q_net,) if values is not None else (network.policy_net, policy.action_net)


def _game_of(learner: Any) -> Game | None:
    """The game of a learner's environment; None if it has none in this process."""
    env = learner.get_env()
    envs = getattr(getattr(env, "unwrapped", None), "envs", None)
    one = envs[0].unwrapped if isinstance(envs, list) else envs
    return getattr(one, "game", None)
