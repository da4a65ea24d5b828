"""A policy made of what was trained on any of the environments."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from agents.policies.sb3 import SB3Policy
from tokenenv.errors import UserError
from tokenenv.game import Game
from tokenenv.game.cost import linear_macs
from tokenenv.game.episode import Episode
from tokenenv.game.policy import Policy


class CalledPolicy(Policy):
    """Calls a function with the observations that the environments give; see :func:`policy_from`.

    If the function gives two numbers for each agent, they count as log-odds of its two actions, up
    to a constant, and the second is chosen where its probability is above :attr:`threshold`; at 0.5
    that is the higher number's action.

    Args:
        call: the function.
        game: the game of the environment.
        macs: multiply-adds of one agent's decision.
    """

    def __init__(self, call: Callable[[Tensor], Any], game: Game, macs: float) -> None:
        self.rules, self.call, self.own_macs = game.rules, call, macs
        self.trained_on, self.actions = game.backbone.architecture, game.actions
        self.threshold = 0.5 if self._weighs(game) else None

    def _weighs(self, game: Game) -> bool:
        """Whether the function gives two numbers for an agent, tried with observations of zeros."""
        width = game.agent_dim + game.shared_dim
        if game.rules.by_count or self.actions != 2:
            return False
        with torch.no_grad():
            answer = self.call(torch.zeros(1, game.agents, width, device=game.backbone.device))
        answer = torch.as_tensor(answer)
        return answer.is_floating_point() and answer.shape == (1, game.agents, 2)

    def next_action(self, episode: Episode) -> Tensor:
        """``(B, a)`` actions in the tokens' order; the function sees the agents in roster order."""
        seen, tokens = episode.observe(), episode.tokens

        def on_roster(values: Tensor) -> Tensor:
            return self.rules.to_roster(episode.backbone, tokens, values)

        own, active = on_roster(seen.agents), on_roster(seen.active)
        shared = seen.shared[:, None].expand(-1, own.shape[1], -1)
        shown = torch.cat([own, shared], 2).float() * active[..., None]
        chosen = self._chosen(shown[:, 0] if self.rules.by_count else shown)
        chosen = chosen.to(active.device).reshape(active.shape)
        if seen.legal is not None:
            legal = on_roster(seen.legal)
            chosen = torch.where(legal.gather(2, chosen[..., None])[..., 0], chosen, 0)
        return self.rules.from_roster(tokens, chosen)

    def _chosen(self, shown: Tensor) -> Tensor:
        """int64 actions, from actions or from a number for each action.

        Raises:
            UserError: the function returned something else.
        """
        answer = torch.as_tensor(self.call(shown))
        if answer.is_floating_point() and answer.shape == (*shown.shape[:-1], self.actions):
            if self.threshold is None:
                return answer.argmax(-1)
            odds = math.log(self.threshold) - math.log1p(-self.threshold)
            return (answer[..., 1] - answer[..., 0] > odds).long()
        whole = not answer.is_floating_point() and answer.shape == shown.shape[:-1]
        if whole and ((answer >= 0) & (answer < self.actions)).all():
            return answer.long()
        raise UserError(
            f"the policy's function returned {answer.dtype} of shape {tuple(answer.shape)} for "
            f"observations {tuple(shown.shape)}: return a whole number from 0 to "
            f"{self.actions - 1} for each, or {self.actions} numbers, of which the highest counts"
        )

    def macs(self, agents: Tensor, removed: Tensor) -> Tensor:
        """``(B,)`` multiply-adds of one decision."""
        return agents * self.own_macs if self.rules.token_agents else agents * 0 + self.own_macs


def policy_from(trained: Any, game: Game, *, macs: float | None = None) -> Policy:
    """A policy for evaluation and for the suite of what was trained on an environment.

    Args:
        trained: one of these. A function or an ``nn.Module`` that maps float32 observations ``(B,
            A, W)`` as the vector environment gives them, ``(B, W)`` where one agent counts, to
            int64 actions ``(B, A)`` or ``(B,)``, or to a number for each action, of which the
            highest counts; where agents have two actions, such a policy has a threshold, at
            several of which the suite measures it. Of TorchRL's actors that is the network inside.
            Or a learner of stable-baselines3; on a game of token agents one that was trained with
            their observations ``(W,)`` one by one, as SuperSuit gives them.
        game: the game that it was trained on: ``env.unwrapped.game``, or ``.game`` of a vector
            environment.
        macs: multiply-adds of one agent's decision; None: counted from the linear layers.

    Raises:
        UserError: it can't be called, or its cost is not known.

    Example:
        >>> from tokenenv import build_game
        >>> from tokenenv.suite import policy_from
        >>> game = build_game(batch_size=1)
        >>> net = torch.nn.Linear(game.agent_dim + game.shared_dim, 2)  # of 109 numbers
        >>> policy_from(net, game).macs(torch.tensor([3.0]), torch.tensor([0.0])).item() / 3
        218.0
    """
    call: Any = trained
    if hasattr(trained, "predict") and hasattr(trained, "policy"):
        if game.rules.by_count:
            return SB3Policy(trained, game)
        call = _one_by_one(trained)
        trained = trained.policy
    if not callable(call):
        raise UserError(f"{trained!r:.60} can't be called: give a function of the observations")
    if macs is None and isinstance(trained, nn.Module):
        macs = float(linear_macs(trained))  # a critic that hangs on the actor counts, too
    if not macs:
        raise UserError(
            f"the cost of {type(trained).__name__} is not known: give macs=, the multiply-adds of "
            "one agent's decision"
        )
    if isinstance(trained, nn.Module):
        trained.eval()
    return CalledPolicy(call, game, macs)


def _one_by_one(learner: Any) -> Callable[[Tensor], Tensor]:
    """The deterministic actions of a learner that observes one agent ``(W,)`` at a time."""

    def call(shown: Tensor) -> Tensor:
        rows = shown.reshape(-1, shown.shape[-1]).cpu().numpy()
        actions, _ = learner.predict(rows, deterministic=True)
        return torch.as_tensor(actions).long().reshape(shown.shape[:-1])

    return call
