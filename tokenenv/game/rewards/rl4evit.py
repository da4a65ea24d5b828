"""RL4EViT's rewards, as its published code comments them and as it runs them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from tokenenv.errors import UserError
from tokenenv.game.checks import check_keep
from tokenenv.game.rewards.base import Reward, Turn

ClassReward = Literal["final", "each"]

# RL4EViT's code takes alpha = 24 for the 196 tokens of a 224-pixel image. What a survivor earns
# is alpha / survivors, so alpha grows with the number of tokens where the balance of gain and
# price shall be at the same share of them.
_ALPHA_PER_TOKEN = 24.0 / 196
_KEEP_PER_DECISION = 0.7


def class_term(turn: Turn, alpha: float, when: ClassReward) -> Tensor:
    """RL4EViT's shared classification reward: ``alpha / alive`` to every living agent if correct.

    It is known, and paid, when the episode ends. ``final`` pays the agents alive at the end;
    ``each`` pays once per decision, those alive after it (the paper's code does that).
    """
    if turn.outcome is None:
        return torch.zeros_like(turn.after[:, :1], dtype=torch.float32)
    paid = turn.history if when == "each" else turn.history[-1:]
    share = sum(after / after.sum(1, keepdim=True).clamp(min=1) for after in paid)
    assert isinstance(share, Tensor)
    return alpha * turn.outcome.correct[:, None] * share


@dataclass(frozen=True)
class AlphaBeta(Reward):
    """RL4EViT's reward: competition to leave, collaboration to classify (papers' "variant P").

    Every living agent pays ``beta`` per decision; the living share ``alpha`` if the prediction is
    right. With a constant probability p of being right a rational agent is indifferent at
    ``alive* = p alpha / beta`` (``class_reward="each"``), whatever the step.

    The paper prints no values; its code's comments have alpha 22 and 24, beta 0.1, 0.106 and
    0.031, for 196 tokens.
    """

    alpha: float = 24.0
    beta: float = 0.1
    class_reward: ClassReward = "each"

    def __post_init__(self) -> None:
        _check_class_reward(self.class_reward)

    def __call__(self, turn: Turn) -> Tensor:
        """Rewards ``(B, A)``."""
        return class_term(turn, self.alpha, self.class_reward) - self.beta * turn.after

    @classmethod
    def fits(cls, token_agents: bool) -> bool:
        """Games of one agent per token."""
        return token_agents

    @classmethod
    def defaults(cls, decisions: int, patches: int) -> dict[str, Any]:
        """``alpha`` in proportion to the number of patches."""
        return {"alpha": _ALPHA_PER_TOKEN * patches}

    @property
    def price(self) -> float:
        """``beta``."""
        return self.beta

    def with_price(self, price: float) -> AlphaBeta:
        """The same reward with another ``beta``."""
        return replace(self, beta=price)


@dataclass(frozen=True)
class KeepTarget(Reward):
    """The reward that RL4EViT's published code runs with ("variant C").

    With ``delta`` = share of living tokens minus the step's target, a living agent gets
    ``-exp(delta)`` while too many live, and one that left in this step ``-exp(-delta)`` while
    too few do; the living share ``alpha`` if the prediction is right. Unlike the code, an agent
    pruned earlier gets nothing: it could not act.

    Attributes:
        targets: share of tokens to be alive after each decision.
    """

    targets: tuple[float, ...] = (0.7, 0.49, 0.343)
    alpha: float = 24.0
    class_reward: ClassReward = "each"

    def __post_init__(self) -> None:
        _check_class_reward(self.class_reward)
        for target in self.targets:
            check_keep(target)

    def __call__(self, turn: Turn) -> Tensor:
        """Rewards ``(B, A)``."""
        self.check(turn.steps)
        delta = turn.after.float().mean(1, keepdim=True) - self.targets[turn.step]
        left = turn.before & ~turn.after
        control = torch.where(delta > 0, -delta.exp() * turn.after, -(-delta).exp() * left)
        return class_term(turn, self.alpha, self.class_reward) + control

    @classmethod
    def fits(cls, token_agents: bool) -> bool:
        """Games of one agent per token."""
        return token_agents

    @classmethod
    def defaults(cls, decisions: int, patches: int) -> dict[str, Any]:
        """``alpha`` in proportion to the number of patches, a target for each decision."""
        targets = tuple(_KEEP_PER_DECISION ** (i + 1) for i in range(decisions))
        return {"alpha": _ALPHA_PER_TOKEN * patches, "targets": targets}

    def check(self, decisions: int) -> None:
        """Raise :class:`UserError` unless there is a target for each of the decisions."""
        if decisions != len(self.targets):
            raise UserError(
                f"keep-target reward has {len(self.targets)} targets for {decisions} decisions: "
                "give one per decision block"
            )


def _check_class_reward(value: str) -> None:
    if value not in ("final", "each"):
        raise UserError(f"class_reward='{value}': choose 'final' or 'each'")
