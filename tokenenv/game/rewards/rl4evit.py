"""RL4EViT's rewards: the one in the comments of its published code, and the one that it runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from tokenenv.errors import UserError, check_choice
from tokenenv.game.checks import check_keep
from tokenenv.game.rewards.base import Reward, Turn

ClassReward = Literal["final", "each"]

# RL4EViT's code has alpha = 24 for the 196 tokens of a 224-pixel image. A kept token earns alpha
# divided by the number of kept tokens. For an equilibrium at the same share of tokens, alpha must
# be proportional to their number.
_ALPHA_PER_TOKEN = 24.0 / 196
_KEEP_PER_DECISION = 0.7


def class_term(turn: Turn, alpha: float, when: ClassReward) -> Tensor:
    """RL4EViT's classification reward: kept tokens share ``alpha`` if the prediction is correct.

    It is paid when the episode ends, since no step of an environment knows the prediction before.
    The published code, which computes rewards after the episode, pays the share of a decision in
    the step of that decision. The sum is the same, but there the last decision has one share at
    stake in the prediction, and here, with ``each``, those of all decisions: 2.2 times as much at
    shares of tokens of 0.7, 0.49 and 0.343.

    Args:
        turn: the decision.
        alpha: what the agents of all kept tokens get together.
        when: ``final``: pay once, for the tokens kept at the end. ``each``: pay for every decision
            of the episode, for the tokens kept by it (as the paper's code does).

    Returns:
        ``(B, A)`` rewards at the end; ``(B, 1)`` zeros before.
    """
    if turn.outcome is None:
        return torch.zeros_like(turn.after[:, :1], dtype=torch.float32)
    paid = turn.history if when == "each" else turn.history[-1:]
    share = sum(after / after.sum(1, keepdim=True).clamp(min=1) for after in paid)
    assert isinstance(share, Tensor)
    return alpha * turn.outcome.correct[:, None] * share


@dataclass(frozen=True)
class AlphaBeta(Reward):
    """RL4EViT's reward as its code's comments describe it: a price per token, a shared gain.

    At every decision the agent of a kept token pays ``beta``; the kept tokens share ``alpha`` if
    the prediction is correct, see :func:`class_term`. With ``class_reward="each"`` and a constant
    probability p of a correct prediction, keeping and being pruned are worth the same to an agent
    when ``p alpha / beta`` tokens are kept, at any step (docs/papers.md, section 6).

    The paper prints no values; its code's comments have alpha 22 and 24, beta 0.1, 0.106 and
    0.031, for 196 tokens.
    """

    alpha: float = 24.0
    beta: float = 0.1
    class_reward: ClassReward = "each"

    def __post_init__(self) -> None:
        check_choice("class_reward", self.class_reward, ClassReward)

    def __call__(self, turn: Turn) -> Tensor:
        """Rewards ``(B, A)``."""
        return class_term(turn, self.alpha, self.class_reward) - self.beta * turn.after

    @classmethod
    def fits(cls, token_agents: bool) -> bool:
        """Whether the game has one agent per token."""
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
    """The reward that RL4EViT's published code runs with: a target share of tokens per decision.

    ``delta`` is the share of kept tokens minus the decision's target. If ``delta > 0``, each kept
    token's agent gets ``-exp(delta)``; otherwise each token pruned by this decision costs its
    agent ``exp(-delta)``. The kept tokens share ``alpha`` if the prediction is correct, see
    :func:`class_term`. Unlike in the code, agents of tokens pruned earlier get nothing, as they
    could not act.

    Attributes:
        targets: share of tokens to keep after each decision.
        alpha: as for :func:`class_term`.
        class_reward: ``final`` or ``each``, see :func:`class_term`.
    """

    targets: tuple[float, ...] = (0.7, 0.49, 0.343)
    alpha: float = 24.0
    class_reward: ClassReward = "each"

    def __post_init__(self) -> None:
        check_choice("class_reward", self.class_reward, ClassReward)
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
        """Whether the game has one agent per token."""
        return token_agents

    @classmethod
    def defaults(cls, decisions: int, patches: int) -> dict[str, Any]:
        """``alpha`` in proportion to the number of patches, and a target for each decision."""
        targets = tuple(_KEEP_PER_DECISION ** (i + 1) for i in range(decisions))
        return {"alpha": _ALPHA_PER_TOKEN * patches, "targets": targets}

    def check(self, decisions: int) -> None:
        """Raise :class:`UserError` unless there is a target for each of the decisions."""
        if decisions != len(self.targets):
            raise UserError(
                f"keep-target reward has {len(self.targets)} targets for {decisions} decisions: "
                "give one per decision block"
            )
