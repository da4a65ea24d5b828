"""DORA (He et al. 2026), merging and pruning: the settings, and what is built from them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import nn

from agents.learners.critic import PrivilegedCritic, SymmetricCritic
from agents.learners.ppo import PPO, PPOConfig
from agents.policies.actor import ActorPolicy, Widths
from agents.policies.gated import GatedPolicy
from agents.systems.base import PolicyConfig
from agents.systems.settings import word
from agents.training.judgement import Judgement
from agents.workers import ALONE, Workers
from tokenenv.data import ImageSource
from tokenenv.errors import UserError
from tokenenv.game import Game
from tokenenv.game.build import build_game
from tokenenv.game.rewards import ClosedLoop, Damage, Dora, PenaltyLoop
from tokenenv.game.rules import LayerPrune
from tokenenv.game.rules.layer_prune import LEAST
from tokenenv.vit.backbone import Backbone


@dataclass(frozen=True)
class _DoraCommon(PolicyConfig):
    """Settings of both systems, ``dora`` and ``dora-prune``.

    Attributes:
        damage: ``divergence``: KL of the logits to the dense ones if no later block removed
            tokens; or ``drift`` of the class token, which has larger values and needs another
            ``penalty``; see :class:`~tokenenv.game.rewards.Dora`.
        terminal: whether damage is penalised only at the end, without dense credit.
        penalty: price of damage before training; with ``closed_loop`` it is adjusted in training.
        target_drop: if above 0, share of the held-back images that top-1 may lose. The penalty then
            follows the drop, as in the paper, and the best policy is the one that saves most
            within it. Measuring a drop of 0.01 takes thousands of images.
        critic: ``privileged`` (observes the dense logits, the course of the episode and, with
            ``critic_depth``, all tokens) or ``symmetric`` (observes what the actor observes).
        critic_width: width of the critic's Transformer; 256 in the paper.
        critic_depth: blocks of the critic's Transformer; 2 in the paper. 0 leaves out the tokens,
            which on a CPU take longer than the rest of the training.
        critic_lr: learning rate of the critic. ``lr`` is that of the actor; in ``dora-prune`` that
            of gate and budget, and encoder and selector have 0.4 of it.
    """

    damage: Damage = "divergence"
    terminal: bool = False
    penalty: float = 60.0
    target_drop: float = 0.0
    critic: Literal["privileged", "symmetric"] = "privileged"
    critic_width: int = 64
    critic_depth: int = 0
    critic_lr: float = 1e-3

    def implied(self, given: dict[str, Any]) -> dict[str, Any]:
        """``target_drop`` implies ``calibrate=0``: the drop is measured at threshold 0.5."""
        return {"calibrate": 0} if given.get("target_drop") else {}

    @property
    def allowed_drop(self) -> float:
        """Share of the images that top-1 may lose: ``target_drop``."""
        return self.target_drop

    def next_price(self, price: float, found: Judgement) -> float:
        """The penalty after a judgement; unchanged without a closed loop."""
        if not self.closed_loop:
            return price
        if self.target_drop:
            return PenaltyLoop(price, self.target_drop).follow(found.drop / 100)
        # The loop adjusts the price of computation, which is the inverse of the penalty.
        return 1 / ClosedLoop(1 / price, self.target_saving).follow(found.saving)

    def make_critic(self, policy: ActorPolicy | GatedPolicy, game: Game) -> nn.Module:
        """Build the privileged or the symmetric critic."""
        if self.critic == "symmetric":
            return SymmetricCritic(game, policy.heads)
        return PrivilegedCritic(game, policy.heads, self.critic_width, self.critic_depth)

    def ppo(self, game: Game) -> PPOConfig:
        """The settings of PPO, with ``critic_lr`` and a gradient norm of at most 0.5."""
        return dataclasses.replace(super().ppo(game), critic_lr=self.critic_lr, max_grad_norm=0.5)

    def _reward(self) -> Dora:
        return Dora(penalty=self.penalty, damage=self.damage, terminal=self.terminal)


@dataclass(frozen=True)
class DoraConfig(_DoraCommon):
    """The settings of ``tokenenv train dora``.

    The defaults are for an ImageNet model, on which ``drift`` takes a quarter of the computation of
    ``divergence`` and trained no worse policy; :meth:`for_digits` is for the embedded model.

    Attributes:
        skip: share of the model's blocks, counted from the first, without decisions if ``blocks``
            is empty. Decisions in early blocks cost most and merge least.
        features: what the agent observes of a candidate pair, see
            :class:`~tokenenv.game.rules.LayerMerge`.
        hidden: widths of the actor's hidden layers.
        initial_merge: probability of merging before training, for a pair with cosines of 0.9.
        lean: slopes of the log-odds of merging before training, per 0.05 of the cosine of the keys,
            of the same less its mean over the candidates, and of the cosine of the tokens; each
            only if ``features`` has it.

    Raises:
        UserError: a value out of its range.
    """

    damage: Damage = "drift"
    skip: float = 0.25
    target_saving: float = 36.0
    lr: float = 3e-3
    features: tuple[str, ...] = ("similarity", "cls_attention", "size", "token")
    hidden: tuple[int, ...] = (32, 32)
    initial_merge: float = 0.2
    lean: tuple[float, float, float] = (2.0, 0.0, 0.0)

    @classmethod
    def for_digits(cls) -> DoraConfig:
        """The default settings for the embedded model of 64 tokens."""
        return cls(
            updates=120, batch=128, held_back=0.3, evaluate_every=10, damage="divergence",
            penalty=120.0, target_saving=73.0, lr=1e-3, initial_merge=0.95, lean=(0.0, 4.0, 0.8),
            skip=0.0,
        )  # fmt: skip

    @classmethod
    def for_large_digits(cls) -> DoraConfig:
        """The default settings for the embedded model of 256 tokens, most of which merge early."""
        return dataclasses.replace(
            cls.for_digits(), updates=40, target_saving=82.0, blocks=(0, 1, 2, 3, 4, 5)
        )

    def game(self, backbone: Backbone, source: ImageSource) -> Game:
        """Build the game to learn from, on the images of ``source``."""
        later = range(int(self.skip * backbone.depth), backbone.depth)
        return build_game(
            rules="layer_merge",
            model=backbone,
            data=source,
            blocks=self.blocks or tuple(later),
            features=self.features,
            reward=self._reward(),
            batch_size=self.batch,
            repeats=self.repeats,
            privileged=True,
        )

    def policy(self, game: Game, model: str) -> ActorPolicy:
        """Build an untrained policy for ``game``, initialised from torch's global generator."""
        policy = ActorPolicy(
            game.rules,
            Widths(game.agent_dim, game.shared_dim, game.state_dim),
            hidden=self.hidden,
            initial=self.initial_merge,
            trained_on=model,
        )
        layout = game.rules.layout(game.backbone)
        keys, relative, tokens = self.lean
        if "similarity" in layout:
            first = layout["similarity"].start
            policy.lean_on(slice(first, first + 1), keys)
            policy.lean_on(slice(first + 1, first + 2), relative)
        if "token" in layout:
            first = layout["token"].start
            policy.lean_on(slice(first, first + 1), tokens)
        return policy.to(game.backbone.device)


@dataclass(frozen=True)
class DoraPruneConfig(_DoraCommon):
    """The settings of ``tokenenv train dora-prune``.

    The defaults are for an ImageNet model; :meth:`for_digits` is for the embedded one.

    Attributes:
        features: what the agent observes of a token, see :class:`~tokenenv.game.rules.LayerPrune`.
        budget_step: spacing of the budgets, see :class:`~tokenenv.game.rules.LayerPrune`.
        width: width of the actor's encoder; 0: a sixth of the model's width, as in the paper.
        initial_gate: probability of an open gate before training.
        initial_budget: number of tokens that an open gate prunes before training, within about a
            third; one number for all decision blocks, or one for each. If ``blocks`` is changed and
            this is not, all blocks start from the mean of the list.
        lean: slopes of the log-odds of pruning a token before training: how fast they fall with
            class attention, and rise with redundancy; each only if ``features`` has it.
        selector: which tokens are pruned: ``learned``, or for comparison ``random`` or
            ``redundancy`` (the most similar ones). With ``random`` they also depend on the size
            of the batch and on the image's place in it.

    Raises:
        UserError: a value out of its range.
    """

    features: tuple[str, ...] = ("keys", "cls_attention", "redundancy")
    budget_step: int = 2
    width: int = 0
    initial_gate: float = 0.2
    initial_budget: tuple[float, ...] = (12.0,)
    lean: tuple[float, float] = (2.0, 20.0)
    selector: Literal["learned", "random", "redundancy"] = "learned"

    def implied(self, given: dict[str, Any]) -> dict[str, Any]:
        """Other ``blocks`` imply that all budgets start from the mean of ``initial_budget``."""
        implied = super().implied(given)
        if given.get("blocks", self.blocks) != self.blocks:
            implied["initial_budget"] = (sum(self.initial_budget) / len(self.initial_budget),)
        return implied

    def learner(
        self,
        policy: ActorPolicy | GatedPolicy,
        game: Game,
        seed: int,
        workers: Workers = ALONE,
    ) -> PPO:
        """Build PPO with DORA's critic.

        Raises:
            UserError: the random selector in several processes, which would not draw the same.
        """
        if self.selector == "random" and workers.count > 1:
            raise UserError("selector=random draws for one process: train it without torchrun")
        return super().learner(policy, game, seed, workers)

    @classmethod
    def for_digits(cls) -> DoraPruneConfig:
        """The default settings for the embedded model; its start was chosen on training images."""
        return cls(
            updates=60, batch=128, repeats=8, held_back=0.3, evaluate_every=10, penalty=150.0,
            target_saving=70.0, lr=1e-3, features=("cls_attention", "redundancy"),
            initial_gate=0.9, blocks=(0, 2, 4, 5), initial_budget=(15.0, 23.0, 9.0, 13.0),
            lean=(0.0, 40.0),
        )  # fmt: skip

    @classmethod
    def for_large_digits(cls) -> DoraPruneConfig:
        """The default settings for the embedded model of 256 tokens, more of them redundant."""
        return dataclasses.replace(
            cls.for_digits(),
            updates=40,
            target_saving=82.0,
            blocks=(0, 2, 4),
            initial_budget=(120.0, 70.0, 30.0),
        )

    def game(self, backbone: Backbone, source: ImageSource) -> Game:
        """Build the game to learn from, on the images of ``source``."""
        return build_game(
            rules="layer_prune",
            model=backbone,
            data=source,
            blocks=self.blocks or None,
            features=self.features,
            budget_step=self.budget_step,
            reward=self._reward(),
            batch_size=self.batch,
            repeats=self.repeats,
            privileged=True,
        )

    def policy(self, game: Game, model: str) -> GatedPolicy:
        """Build an untrained policy for ``game``, initialised from torch's global generator."""
        rules = cast(LayerPrune, game.rules)
        steps, layout = len(rules.blocks), rules.layout(game.backbone)
        if len(self.initial_budget) not in (1, steps):
            raise UserError(
                f"initial_budget={word(self.initial_budget)} is for "
                f"{len(self.initial_budget)} decision blocks and there are {steps}: give one "
                "number for all of them, or one for each"
            )
        most = game.backbone.patches - LEAST
        if max(self.initial_budget) > most:
            raise UserError(
                f"initial_budget={word(self.initial_budget)} is more than can leave: of "
                f"{game.backbone.patches} tokens {LEAST} stay, so give at most {most}"
            )
        policy = GatedPolicy(
            rules,
            {
                "key": game.shared_dim - steps - 3,
                "own": game.agent_dim,
                "patches": game.backbone.patches,
            },
            width=self.width or max(8, game.backbone.dim // 6),
            initial_gate=self.initial_gate,
            initial_budget=self.initial_budget,
            selector=self.selector,
            trained_on=model,
        )
        if self.selector == "redundancy":
            if "redundancy" not in layout:
                raise UserError("selector=redundancy reads the feature 'redundancy': add it")
            policy.lean_on(layout["redundancy"], 1.0)
            return policy.to(game.backbone.device)
        for name, slope in zip(("cls_attention", "redundancy"), self.lean, strict=True):
            if name in layout:
                policy.lean_on(layout[name], slope if name == "redundancy" else -slope)
        return policy.to(game.backbone.device)
