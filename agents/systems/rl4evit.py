"""RL4EViT (Lu et al., ICME 2025): the settings, and what is built from them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from agents.learners.mappo import MAPPO, MAPPOConfig
from agents.policies.actor import ActorPolicy, Decide, Widths
from agents.systems.base import PolicyConfig
from agents.workers import ALONE, Workers
from tokenenv.data import ImageSource
from tokenenv.errors import UserError
from tokenenv.game import Game
from tokenenv.game.build import build_game
from tokenenv.vit.backbone import Backbone


@dataclass(frozen=True)
class RL4EViTConfig(PolicyConfig):
    """The settings of ``tokenenv train rl4evit``.

    The defaults are for an ImageNet model; :meth:`for_digits` is for the embedded one.

    Attributes:
        features: what an agent observes of its own token.
        share: whether it also observes the class token.
        reward: ``cooperative`` (ours), ``alpha_beta`` or ``keep_target`` (RL4EViT's).
        beta: price of a token kept, per decision (``cooperative``, ``alpha_beta``), before
            training; with ``closed_loop`` it is adjusted in training. Choosing ``alpha_beta`` sets
            it to 0.1 and ``closed_loop`` to false unless they are given.
        alpha: weight of the class reward; 0: the default of the reward for the model.
        class_reward: RL4EViT's class reward, paid for ``each`` decision or the ``final`` one.
        targets: shares of the tokens to keep after each decision (``keep_target``); empty: 0.7,
            0.49, 0.343.
        centralised: whether the critic observes the global state (MAPPO), in which two numbers
            need the label, see :func:`~tokenenv.game.dense.confidence`; or not (IPPO).
        labels: whether the centralised critic reads these two numbers.
        hidden: widths of the actor's and critic's hidden layers.
        initial_keep: probability of keeping a token of mean class attention before training.
        lean: slope of the log-odds of keeping a token over ``cls_attention`` before training, if
            ``features`` has it: the policy starts as a soft top-k by class attention.
        decide: how the deterministic policy decides, by ``threshold`` or ``systematic`` sampling,
            see :class:`~agents.policies.actor.ActorPolicy`.

    Raises:
        UserError: a value out of its range.
    """

    updates: int = 320
    features: tuple[str, ...] = (
        "position",
        "progress",
        "cls_attention",
        "redundancy",
        "similarity",
        "norm",
    )
    share: bool = False
    reward: Literal["cooperative", "alpha_beta", "keep_target"] = "cooperative"
    alpha: float = 0.0
    beta: float = 0.0005
    class_reward: Literal["each", "final"] = "each"
    targets: tuple[float, ...] = ()
    centralised: bool = True
    labels: bool = True
    hidden: tuple[int, ...] = (32, 32)
    initial_keep: float = 0.985
    lean: float = 4.0
    calibrate: int = 6
    decide: Decide = "threshold"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.closed_loop and not self.beta and self.reward != "keep_target":
            raise UserError(
                "beta=0 can't follow the saving: give a price above 0, or --set closed_loop=false"
            )

    @classmethod
    def for_digits(cls) -> RL4EViTConfig:
        """The default settings for the embedded model.

        Pruning by its class attention loses as much top-1 as pruning at random, so the policy
        starts without it (``lean=0``). Many tokens are about equally important: keeping enough of
        them everywhere in the image matters more than which, hence systematic sampling.
        """
        return cls(
            updates=100,
            batch=128,
            beta=1e-4,
            lean=0.0,
            initial_keep=0.9,
            lr=3e-3,
            held_back=0.3,
            evaluate_every=10,
            target_saving=55.0,
            decide="systematic",
        )

    @classmethod
    def for_scenes(cls) -> RL4EViTConfig:
        """The default settings for the embedded model of generated scenes.

        The policy starts as a loose preference for tokens that the class token attends to, at
        about the wanted saving. It has to learn from the tokens' embeddings which of them show the
        digit, early on, and how many tokens an image needs.
        """
        return dataclasses.replace(
            cls.for_digits(),
            beta=1e-3,
            blocks=(1, 2, 4),
            features=("token", *cls.features),
            lean=1.5,
            initial_keep=0.65,
            held_back=0.2,
            target_saving=72.0,
        )

    def implied(self, given: dict[str, Any]) -> dict[str, Any]:
        """The reward ``alpha_beta`` implies RL4EViT's constant price, ``beta=0.1``."""
        own_price = {"beta": 0.1, "closed_loop": False}
        return own_price if given.get("reward") == "alpha_beta" else {}

    def reward_kwargs(self) -> dict[str, Any]:
        """Arguments of the chosen reward; those left out have the reward's defaults."""
        alpha = {"alpha": self.alpha} if self.alpha else {}
        if self.reward == "cooperative":
            return {**alpha, "beta": self.beta}
        if self.reward == "alpha_beta":
            return {**alpha, "beta": self.beta, "class_reward": self.class_reward}
        targets = {"targets": self.targets} if self.targets else {}
        return {**alpha, **targets, "class_reward": self.class_reward}

    def game(self, backbone: Backbone, source: ImageSource) -> Game:
        """Build the game to learn from, on the images of ``source``."""
        return build_game(
            model=backbone,
            data=source,
            blocks=self.blocks or None,
            features=self.features,
            share=self.share,
            reward=self.reward,
            reward_kwargs=self.reward_kwargs(),
            batch_size=self.batch,
            repeats=self.repeats,
        )

    def policy(self, game: Game, model: str) -> ActorPolicy:
        """Build an untrained policy for ``game``, initialised from torch's global generator."""
        policy = ActorPolicy(
            game.rules,
            Widths(game.agent_dim, game.shared_dim, game.state_dim),
            hidden=self.hidden,
            initial=self.initial_keep,
            decide=self.decide,
            trained_on=model,
        )
        layout = game.rules.layout(game.backbone)
        if "cls_attention" in layout:
            policy.lean_on(layout["cls_attention"], self.lean)
        return policy.to(game.backbone.device)

    def ppo(self, game: Game) -> MAPPOConfig:
        """The settings of MAPPO: those of PPO, and those of the critic."""
        return MAPPOConfig(
            **vars(super().ppo(game)),
            hidden=self.hidden,
            centralised=self.centralised,
            labels=self.labels,
        )

    def learner(self, policy: Any, game: Game, seed: int, workers: Workers = ALONE) -> MAPPO:
        """Build MAPPO, or IPPO without the centralised critic."""
        return MAPPO(policy, game, self.ppo(game), seed=seed, workers=workers)
