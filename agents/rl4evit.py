"""RL4EViT (Lu et al., ICME 2025): the settings of a run and the pieces built from them."""

from __future__ import annotations

import dataclasses
import inspect
import math
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from agents.mappo import MAPPO, MAPPOConfig
from agents.policy import ActorPolicy, Widths
from tokenenv.errors import UserError
from tokenenv.game import Game

Check = tuple[Callable[[Any], bool], str]
"""Whether a value will do, and words for those that will."""

_FROM_ONE: Check = (lambda v: v >= 1, "at least 1")
_FROM_ZERO: Check = (lambda v: v >= 0, "at least 0")
_POSITIVE: Check = (lambda v: v > 0, "greater than 0")
_PERCENT: Check = (lambda v: 0 < v < 100, "between 0 and 100")
_SHARE: Check = (lambda v: 0 <= v <= 1, "from 0 to 1")
_PART: Check = (lambda v: 0 < v < 1, "between 0 and 1")
_CHECKS: dict[str, Check] = {
    **dict.fromkeys(("updates", "batch", "repeats", "evaluate_every"), _FROM_ONE),
    **dict.fromkeys(("epochs", "minibatches"), _FROM_ONE),
    **dict.fromkeys(("alpha", "beta", "entropy", "calibrate"), _FROM_ZERO),
    **dict.fromkeys(("lr", "clip"), _POSITIVE),
    **dict.fromkeys(("gamma", "lam"), _SHARE),
    **dict.fromkeys(("held_back", "initial_keep"), _PART),
    "target_saving": _PERCENT,
    "hidden": (lambda v: bool(v) and min(v) >= 1, "one or more widths, such as 64/64"),
    "features": (bool, "one or more names, such as token/position"),
}


@dataclass(frozen=True)
class RL4EViTConfig:
    """What ``tokenenv train rl4evit --set key=value`` can set.

    The defaults are for an ImageNet model; :meth:`for_digits` for the embedded one.

    Attributes:
        updates: rollouts of ``batch`` images and their PPO epochs.
        batch: images per rollout.
        blocks: decision blocks; empty: three, spread evenly.
        features: what an agent sees of its own token.
        share: whether it also sees the class token.
        reward: ``cooperative`` (ours), ``alpha_beta`` or ``keep_target`` (RL4EViT's).
        beta: price of a token per decision (``cooperative``, ``alpha_beta``); choosing
            ``alpha_beta`` sets it to 0.1 and ``closed_loop`` to false unless they are given.
        alpha: weight of the class reward; 0: the default of the reward for this model.
        class_reward: RL4EViT's class reward, paid for ``each`` decision or the ``final`` one.
        targets: shares to keep after each decision (``keep_target``); empty: 0.7, 0.49, 0.343.
        centralised: critic with the global state (MAPPO); without it IPPO.
        hidden: widths of the actor's and critic's hidden layers.
        initial_keep: probability of keeping a token of mean class attention before training.
        lean: how fast the log-odds of keeping rise with ``cls_attention`` before training, where
            that is among the features: the policy starts as a soft top-k by class attention.
        repeats: how often each image is in a batch, see :class:`~agents.mappo.MAPPOConfig`.
        lr, entropy, epochs, minibatches, gamma, lam, clip: PPO.
        held_back: share of the training images on which policies are compared, not trained.
        evaluate_every: updates between two such comparisons.
        closed_loop: whether the price ``beta`` follows the saving on the held-back images
            (``cooperative``, ``alpha_beta``), see :class:`~tokenenv.rewards.ClosedLoop`.
        target_saving: percent of the multiply-adds that the policy shall save there.
        calibrate: bisection steps for the policy's threshold at the end; 0 leaves it at 0.5.

    Raises:
        UserError: a value out of its range.
    """

    updates: int = 320
    batch: int = 64
    blocks: tuple[int, ...] = ()
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
    hidden: tuple[int, ...] = (32, 32)
    initial_keep: float = 0.985
    lean: float = 4.0
    repeats: int = 4
    lr: float = 2e-3
    entropy: float = 0.001
    epochs: int = 4
    minibatches: int = 4
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    held_back: float = 0.15
    evaluate_every: int = 20
    closed_loop: bool = True
    target_saving: float = 26.5
    calibrate: int = 6

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            fits, words = _CHECKS.get(key, (lambda v: True, ""))
            if isinstance(value, float) and not math.isfinite(value):
                fits, words = (lambda v: False), "a finite number"
            if not fits(value):
                raise UserError(f"{key}={_text(value)} doesn't do: it must be {words}")

    @classmethod
    def for_digits(cls) -> RL4EViTConfig:
        """Settings for the embedded model.

        Its class attention does not tell which tokens matter (pruning by it loses as much as
        pruning at random), so the policy does not lean on it.
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
            target_saving=38.0,
        )

    def reward_kwargs(self) -> dict[str, Any]:
        """What the chosen reward is built with; what is left out takes the reward's default."""
        alpha = {"alpha": self.alpha} if self.alpha else {}
        if self.reward == "cooperative":
            return {**alpha, "beta": self.beta}
        if self.reward == "alpha_beta":
            return {**alpha, "beta": self.beta, "class_reward": self.class_reward}
        targets = {"targets": self.targets} if self.targets else {}
        return {**alpha, **targets, "class_reward": self.class_reward}

    def policy(self, game: Game, model: str) -> ActorPolicy:
        """An untrained policy for ``game``; initialised from torch's global generator."""
        policy = ActorPolicy(
            game.rules,
            Widths(game.agent_dim, game.shared_dim, game.state_dim),
            hidden=self.hidden,
            initial_keep=self.initial_keep,
            trained_on=model,
        )
        layout = game.rules.layout(game.backbone)
        if "cls_attention" in layout:
            policy.lean_on(layout["cls_attention"], self.lean)
        return policy.to(game.backbone.device)

    def learner(self, policy: ActorPolicy, game: Game, seed: int) -> MAPPO:
        """MAPPO, or IPPO without the centralised critic."""
        config = MAPPOConfig(
            steps=game.steps,
            epochs=self.epochs,
            minibatches=self.minibatches,
            gamma=self.gamma,
            lam=self.lam,
            clip=self.clip,
            actor_lr=self.lr,
            critic_lr=self.lr,
            entropy=self.entropy,
            hidden=self.hidden,
            centralised=self.centralised,
            repeats=self.repeats,
        )
        return MAPPO(policy, game, config, seed=seed)


def with_settings(config: RL4EViTConfig, settings: list[str]) -> RL4EViTConfig:
    """``config`` with ``key=value`` words applied; lists are separated by slashes or commas.

    Raises:
        UserError: unknown key, or a value of the wrong type.
    """
    hints = typing.get_type_hints(RL4EViTConfig)
    values: dict[str, Any] = {}
    for setting in settings:
        key, sep, text = setting.partition("=")
        if not sep:
            raise UserError(f"--set {setting}: the form is key=value")
        if key not in hints:
            raise UserError(f"--set {setting}: unknown key; choose from {', '.join(sorted(hints))}")
        try:
            values[key] = _parse(hints[key], text)
        except ValueError:
            raise UserError(f"--set {setting}: {key} takes {_describe(hints[key])}") from None
    if values.get("reward") == "alpha_beta":
        # RL4EViT's reward comes with a price of its own, which stays where it is unless asked.
        values = {"beta": 0.1, "closed_loop": False, **values}
    changed = dataclasses.replace(config, **values)
    if changed.closed_loop and not changed.beta and changed.reward != "keep_target":
        raise UserError(
            "beta=0 can't follow the saving: give a price above 0, or --set closed_loop=false"
        )
    return changed


def settings_help() -> str:
    """Every setting with its default, then what each of them means."""
    digits = vars(RL4EViTConfig.for_digits())
    defaults = [
        f"  {key}={_text(value)}"
        + (f"  (embedded model: {_text(digits[key])})" if digits[key] != value else "")
        for key, value in vars(RL4EViTConfig()).items()
    ]
    meanings = inspect.cleandoc(RL4EViTConfig.__doc__ or "").partition("Attributes:\n")[2]
    return "\n".join(["defaults:", *defaults, "", "meanings:", meanings.partition("\n\n")[0]])


def _text(value: Any) -> str:
    """A value as ``--set`` takes it."""
    if isinstance(value, tuple):
        return "/".join(map(_text, value))
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def _parse(hint: Any, text: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return tuple(_parse(args[0], part) for part in text.replace("/", ",").split(",") if part)
    if origin is Literal:
        if text not in args:
            raise ValueError(text)
        return text
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    return hint(text)


def _describe(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return f"a list of {_describe(args[0])}, such as a/b/c"
    if origin is Literal:
        return " or ".join(args)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
    return names[hint]
