"""The base class of systems that train a policy by PPO on a frozen backbone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from agents.learners.ppo import PPO, PPOConfig
from agents.systems.settings import SystemConfig
from agents.training.judgement import Judgement
from agents.workers import ALONE, Workers
from tokenenv.data import ImageSource
from tokenenv.game import Game
from tokenenv.game.rewards import ClosedLoop
from tokenenv.vit.backbone import Backbone

if TYPE_CHECKING:
    from agents.training.request import Request
    from agents.training.rl import PolicyTraining


@dataclass(frozen=True)
class PolicyConfig(SystemConfig):
    """Settings of a system whose policy learns by PPO, and what is built from them.

    A subclass implements :meth:`game`, :meth:`policy` and :meth:`make_critic`, or in place of the
    last one :meth:`learner`.

    Attributes:
        updates: rollouts of ``batch`` images, each followed by epochs of PPO.
        minutes: if above 0, the time after which no further update is started; the training is then
            shorter than ``updates``, and no longer the same on another machine.
        batch: images per rollout.
        repeats: how often each image is in a batch, see :class:`~agents.learners.ppo.PPOConfig`.
        blocks: decision blocks; empty: the default of the system.
        closed_loop: whether the price in the reward is adjusted to the saving or drop that the
            policy reaches on the held-back images.
        target_saving: share of ``cost`` that the policy should save there, percent.
        cost: ``macs``, or ``time``: the time predicted from a table of this machine, measured
            before training. It then is what the reward prices, what the closed loop and the
            threshold follow, and what policies are chosen by.
        cost_batch: with ``cost=time``, the batch size that the time is meant for.
        lr, entropy, epochs, minibatches, gamma, lam, clip: of PPO: learning rate, entropy
            coefficient, epochs and minibatches per rollout, discount, GAE lambda, clip range.
        held_back: share of the training images on which policies are compared, not trained.
        held_most: largest number of these images.
        evaluate_every: updates between two such comparisons.
        calibrate: bisection steps for the policy's threshold at the end; 0 leaves it at 0.5.

    Raises:
        UserError: a value out of its range.
    """

    updates: int = 240
    minutes: float = 0.0
    batch: int = 64
    repeats: int = 4
    blocks: tuple[int, ...] = ()
    closed_loop: bool = True
    target_saving: float = 26.5
    cost: Literal["macs", "time"] = "macs"
    cost_batch: int = 1
    lr: float = 2e-3
    entropy: float = 0.001
    epochs: int = 4
    minibatches: int = 4
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    held_back: float = 0.15
    held_most: int = 1000
    evaluate_every: int = 20
    calibrate: int = 7

    @property
    def allowed_drop(self) -> float:
        """Share of the images that top-1 may lose; 0 if the target is a saving."""
        return 0.0

    def game(self, backbone: Backbone, source: ImageSource) -> Game:
        """Build the game to learn from, on the images of ``source``."""
        raise NotImplementedError

    def policy(self, game: Game, model: str) -> Any:
        """Build an untrained policy for ``game``, initialised from torch's global generator.

        ``model``: timm's name of the backbone's model.
        """
        raise NotImplementedError

    def make_critic(self, policy: Any, game: Game) -> nn.Module:
        """Build an untrained :class:`~agents.learners.ppo.Critic` for ``policy``."""
        raise NotImplementedError

    def ppo(self, game: Game) -> PPOConfig:
        """The settings of PPO for ``game``."""
        return PPOConfig(
            steps=game.steps,
            epochs=self.epochs,
            minibatches=self.minibatches,
            gamma=self.gamma,
            lam=self.lam,
            clip=self.clip,
            actor_lr=self.lr,
            critic_lr=self.lr,
            entropy=self.entropy,
            repeats=self.repeats,
        )

    def learner(self, policy: Any, game: Game, seed: int, workers: Workers = ALONE) -> PPO:
        """Build the learner of ``policy``; ``workers``: the processes that train together."""
        critic: Any = self.make_critic(policy, game).to(game.backbone.device)
        return PPO(policy, critic, game, self.ppo(game), seed=seed, workers=workers)

    def next_price(self, price: float, found: Judgement) -> float:
        """The price in the reward after a judgement; unchanged without a closed loop."""
        if not self.closed_loop:
            return price
        return ClosedLoop(price, self.target_saving).follow(found.saving)

    def training(self, request: Request, workers: Workers, out: Path) -> PolicyTraining:
        """Build the training run, see :meth:`~agents.systems.settings.SystemConfig.training`."""
        from agents.training.rl import PolicyTraining

        return PolicyTraining(request, self, workers, out)
