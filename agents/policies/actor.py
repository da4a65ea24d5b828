"""The policy of RL4EViT and of DORA: one perceptron for all agents of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from agents.policies.networks import SharedMLP
from agents.policies.trainable import Columns, Head, Trainable
from agents.workers import WHOLE, Rows
from tokenenv.errors import UserError
from tokenenv.game.rules import RULES, Observation, Rules
from tokenenv.game.stored import describe, remake
from tokenenv.vit.backbone import Backbone


@dataclass(frozen=True)
class Widths:
    """Widths of an observation's parts: agent's own view F, shared view G, state S."""

    own: int
    shared: int
    state: int


Decide = Literal["threshold", "systematic"]
"""How probabilities become decisions, see :class:`ActorPolicy`."""

_ILLEGAL = -1e9
_UNIT = 2**20  # probabilities are counted in these, since sums of whole numbers are exact


def systematic(chance: Tensor, active: Tensor) -> Tensor:
    """Choose as often as ``chance`` says and as evenly as can be: systematic sampling.

    Along the row of those that may act (tokens lie row by row of the image) chances add up; whoever
    lifts the sum over the next whole number, less a half, is chosen. So of any stretch of the row
    as many are chosen as its chances sum to, give or take one (Madow 1949, "On the theory of
    systematic sampling, II"; the first pick is not drawn but in the middle).

    Args:
        chance: ``(B, A)`` probabilities.
        active: ``(B, A)`` bool.

    Returns:
        ``(B, A)`` bool. A chance of 1 is always taken, one of 0 never.
    """
    units = (chance.float() * _UNIT).round().long() * active  # times a power of two: exact
    reached = units.cumsum(1) + _UNIT // 2
    return reached // _UNIT > (reached - units) // _UNIT


class ActorPolicy(Trainable):
    """One perceptron shared by all agents, which says how likely each acts.

    Under rules that prune the last action is to keep, under rules that merge it is to merge.

    A linear path from both views to the log-odds of the last action runs beside the perceptron:
    it starts where :meth:`lean_on` puts it, and learns soon how willing each block should be.

    Args:
        rules: the rules it was trained under.
        widths: of the observations it reads.
        hidden: widths of the hidden layers.
        actions: number of actions.
        initial: probability of the last action before training.
        threshold: the probability from which on the last action is taken.
        decide: how probabilities become decisions where there are two actions. ``threshold``: each
            agent by itself. ``systematic``: as many agents act as the probabilities sum to, spread
            over the image (:func:`systematic`); the threshold then shifts their log-odds, 0.5 by
            nothing. It plays what was trained, where agents were right to be unsure: of equal
            tokens that may go, every second one goes, not all or none.
        trained_on: name of the backbone, for the error message when it doesn't fit.
    """

    heads: tuple[str, ...] = ("action",)

    def __init__(
        self,
        rules: Rules,
        widths: Widths,
        *,
        hidden: Sequence[int] = (64, 64),
        actions: int = 2,
        initial: float = 0.5,
        threshold: float = 0.5,
        decide: Decide = "threshold",
        trained_on: str = "",
    ) -> None:
        super().__init__()
        self.rules, self.widths, self.hidden = rules, widths, tuple(hidden)
        self.actions, self.threshold, self.trained_on = actions, threshold, trained_on
        if decide not in get_args(Decide):
            raise UserError(f"decide='{decide}': choose from {', '.join(get_args(Decide))}")
        self.decide = decide
        self.actor = SharedMLP(widths.own, widths.shared, hidden, actions, gain=0.01)
        self.skip = nn.Linear(widths.own, 1, bias=False)
        nn.init.zeros_(self.skip.weight)
        self.skip_shared = nn.Linear(widths.shared, 1, bias=False) if widths.shared else None
        if self.skip_shared is not None:
            nn.init.zeros_(self.skip_shared.weight)
        with torch.no_grad():
            odds = initial / (1 - initial) * (actions - 1)
            self.actor.head.bias[-1] = torch.tensor(odds).log()

    def logits(self, agents: Tensor, shared: Tensor) -> Tensor:
        """``(..., A, actions)`` unnormalised log-probabilities."""
        logits = self.actor(agents, shared)
        last = logits[..., -1:] + self.skip(agents)
        if self.skip_shared is not None:
            last = last + self.skip_shared(shared)[..., None, :]
        return torch.cat([logits[..., :-1], last], dim=-1)

    def lean_on(self, feature: slice, slope: float) -> None:
        """Start with log-odds of the last action that rise by ``slope`` per unit of a feature.

        A policy that starts as a soft threshold on a good feature explores near sensible
        decisions; from there on it is free to learn.
        """
        with torch.no_grad():
            self.skip.weight[:, feature] = slope

    def draw(
        self, seen: Columns, generator: torch.Generator, rows: Rows = WHOLE
    ) -> tuple[Tensor, Columns]:
        """Random actions ``(B, A)``, ``rows`` of a batch; they are all that was drawn."""
        log_probs = self._log_probs(seen)
        # Gumbel-max: one kernel for all agents, and a generator of our own.
        noise = rows.rand(log_probs.shape, generator)
        action = (log_probs - (-noise.clamp(min=1e-20).log()).log()).argmax(-1)
        return action, {"action": action}

    def score(self, seen: Columns, choice: Columns) -> dict[str, Head]:
        """Log-probabilities ``(B, A)`` of the actions; those of the active count."""
        log_probs = self._log_probs(seen)
        log_prob = log_probs.gather(-1, choice["action"][..., None])[..., 0]
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        return {"action": Head(log_prob, entropy, seen["active"])}

    def _log_probs(self, seen: Columns) -> Tensor:
        logits = self.logits(seen["agents"], seen["shared"])
        if "legal" in seen:
            logits = logits.masked_fill(~seen["legal"], _ILLEGAL)
        return logits.log_softmax(-1)

    @property
    def adjustable(self) -> bool:
        """Of more than two actions the likeliest is taken, whatever the threshold."""
        return self.actions == 2

    @torch.no_grad()
    def act(self, observation: Observation) -> Tensor:
        """The deterministic decision, ``(B, A)``."""
        if self.actions != 2:
            return self._legal_logits(observation).argmax(-1)
        odds, bar = self._odds(observation), torch.logit(torch.tensor(self.threshold)).item()
        if self.decide == "threshold":
            return (odds >= bar).long()
        return systematic((odds - bar).sigmoid(), observation.active).long()

    def _legal_logits(self, observation: Observation) -> Tensor:
        logits = self.logits(observation.agents, observation.shared)
        if observation.legal is None:
            return logits
        return logits.masked_fill(~observation.legal, _ILLEGAL)

    def _odds(self, observation: Observation) -> Tensor:
        """``(B, A)`` log-odds of the second of two actions."""
        active = observation.active
        if observation.legal is not None or active.device.type != "cpu" or len(active) == 1:
            return _difference(self._legal_logits(observation))
        # No work for those that may not act. Elsewhere the device would be waited for.
        some = active.flatten().nonzero()[:, 0]
        image = some.div(active.shape[1], rounding_mode="floor")
        own = observation.agents.flatten(0, 1).index_select(0, some)[:, None]
        found = _difference(self.logits(own, observation.shared.index_select(0, image)))
        odds = found.new_full((active.numel(),), -torch.inf)
        return odds.index_copy_(0, some, found[:, 0]).view_as(active)

    def macs(self, agents: Tensor, removed: Tensor) -> Tensor:
        """Multiply-adds of one decision of ``agents`` agents that removed so many tokens."""
        return self.actor.macs(agents) + agents * self.widths.own + self.widths.shared

    def check_fit(self, backbone: Backbone, name: str) -> None:
        """Raise :class:`UserError` unless the policy belongs to the model."""
        super().check_fit(backbone, name)
        given = self.rules.agent_dim(backbone), self.rules.shared_dim(backbone)
        if (self.widths.own, self.widths.shared) != given:
            raise UserError(
                f"the policy was trained for '{self.trained_on}' ({self.widths.own}+"
                f"{self.widths.shared} inputs) and model '{name}' gives {given[0]}+{given[1]}: "
                "use it with the model it was trained on, or train one for this model"
            )

    def config(self) -> dict[str, Any]:
        """Everything but the weights, as JSON."""
        return {
            "class": "ActorPolicy",
            "rules": describe(self.rules),
            "widths": asdict(self.widths),
            "hidden": list(self.hidden),
            "actions": self.actions,
            "threshold": self.threshold,
            "decide": self.decide,
            "trained_on": self.trained_on,
        }

    @classmethod
    def remade(cls, config: dict[str, Any], trust: bool = False) -> ActorPolicy:
        """An untrained policy of this :meth:`config`."""
        rules, widths = (
            remake(config.pop("rules"), RULES.values(), trust),
            Widths(**config.pop("widths")),
        )
        return cls(rules, widths, **config)


def _difference(logits: Tensor) -> Tensor:
    """``(..., 2)`` -> ``(...)`` log-odds."""
    return logits[..., 1] - logits[..., 0]
