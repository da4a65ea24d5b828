"""The policy of RL4EViT and of DORA: one perceptron for all agents of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from agents.policies.networks import SharedMLP
from agents.policies.trainable import Columns, Head, Trainable
from agents.workers import WHOLE, Rows
from tokenenv.artefact import check_annotated
from tokenenv.errors import UserError, check_choice
from tokenenv.game.checks import check_threshold
from tokenenv.game.rules import RULES, Observation, Rules
from tokenenv.game.stored import describe, remake
from tokenenv.vit.backbone import Backbone


@dataclass(frozen=True)
class Widths:
    """Widths of an observation's parts: own features F, shared features G, state S."""

    own: int
    shared: int
    state: int


Decide = Literal["threshold", "systematic"]
"""How probabilities are turned into deterministic actions, see :class:`ActorPolicy`."""

_ILLEGAL = -1e9
_FEW = 1024  # agents from which it pays to skip the inactive ones
_UNIT = 2**20  # probabilities as multiples of 1 / _UNIT, because integer sums are exact


def systematic(chance: Tensor, active: Tensor) -> Tensor:
    """Systematic sampling: choose agents evenly, as many as their probabilities sum to.

    The probabilities of active agents are summed cumulatively, in the order of the agents (tokens:
    row by row of the image). An agent is chosen if it lifts the sum past the next integer plus one
    half. In any interval of agents the number chosen then differs from the sum of probabilities by
    less than about one (Madow 1949, "On the theory of systematic sampling, II"; there the offset is
    random, here it is one half).

    Args:
        chance: ``(B, A)`` probabilities.
        active: ``(B, A)`` bool.

    Returns:
        ``(B, A)`` bool. A probability of 1 is always chosen, one of 0 never.
    """
    units = (chance.float() * _UNIT).round().long() * active  # a product by a power of 2 is exact
    reached = units.cumsum(1) + _UNIT // 2
    return reached // _UNIT > (reached - units) // _UNIT


class ActorPolicy(Trainable):
    """One perceptron, shared by all agents, that gives the probabilities of each agent's actions.

    The last of two actions is to keep under rules that prune, and to merge under rules that merge.

    A linear layer from own and shared features to the log-odds of the last action is added to the
    perceptron. :meth:`lean_on` initialises it, and it quickly learns a bias for each block.

    Args:
        rules: the rules it is trained under.
        widths: widths of the observations it reads.
        hidden: widths of the hidden layers.
        actions: number of actions.
        initial: probability of the last action before training.
        threshold: the probability from which the last action is taken.
        decide: how probabilities are turned into deterministic actions if there are two.
            ``threshold``: each agent by itself. ``systematic``: as many agents take the last action
            as the probabilities sum to, spread over the image (:func:`systematic`); the threshold
            then shifts the log-odds, 0.5 not at all. This is closer to the stochastic policy that
            was trained: of many tokens with probability one half it keeps every second one,
            not all or none.
        trained_on: timm's name of the backbone it is trained on.

    Raises:
        UserError: an unknown ``decide``, or a threshold that is no probability between 0 and 1.
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
        self.actions, self.threshold = actions, check_threshold(threshold)
        self.trained_on = trained_on
        check_choice("decide", decide, Decide)
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
        """Initialise the log-odds of the last action to rise by ``slope`` per unit of a feature.

        The untrained policy is then a soft threshold on that feature, so that it explores near
        sensible decisions.
        """
        with torch.no_grad():
            self.skip.weight[:, feature] = slope

    def draw(
        self, seen: Columns, generator: torch.Generator, rows: Rows = WHOLE
    ) -> tuple[Tensor, Columns]:
        """Sample actions ``(B, A)`` for ``rows`` of a batch; returns them and the choice."""
        log_probs = self._log_probs(seen)
        # Gumbel-max samples all agents at once with our own generator.
        noise = rows.rand(log_probs.shape, generator)
        action = (log_probs - (-noise.clamp(min=1e-20).log()).log()).argmax(-1)
        return action, {"action": action}

    def score(self, seen: Columns, choice: Columns) -> dict[str, Head]:
        """Log-probabilities ``(B, A)`` of the actions, with the mask of active agents."""
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
        """Whether the threshold has an effect: only if there are two actions."""
        return self.actions == 2

    @torch.no_grad()
    def act(self, observation: Observation) -> Tensor:
        """The deterministic actions ``(B, A)`` int64."""
        if self.actions != 2:
            return self._legal_logits(observation).argmax(-1)
        odds, bar = self._odds(observation), _log_odds(self.threshold)
        if self.decide == "threshold":
            return (odds >= bar).long()
        return systematic((odds - bar).sigmoid(), observation.active).long()

    @torch.no_grad()
    def chances(self, observation: Observation) -> Tensor:
        """``(B, A)`` probability of pruning or merging: of all actions that do not keep."""
        probabilities = self._legal_logits(observation).softmax(-1)
        actions = torch.arange(self.actions, device=probabilities.device)
        return (probabilities * ~self.rules.keeps(actions)).sum(-1)

    def _legal_logits(self, observation: Observation) -> Tensor:
        logits = self.logits(observation.agents, observation.shared)
        if observation.legal is None:
            return logits
        return logits.masked_fill(~observation.legal, _ILLEGAL)

    def _odds(self, observation: Observation) -> Tensor:
        """Log-odds ``(B, A)`` of the second of two actions."""
        active = observation.active
        few = active.numel() <= _FEW or active.device.type != "cpu"
        if observation.legal is not None or few:
            return _difference(self._legal_logits(observation))
        # Skip inactive agents. On other devices that would synchronise.
        some = active.flatten().nonzero()[:, 0]
        image = some.div(active.shape[1], rounding_mode="floor")
        own = observation.agents.flatten(0, 1).index_select(0, some)[:, None]
        found = _difference(self.logits(own, observation.shared.index_select(0, image)))
        odds = found.new_full((active.numel(),), -torch.inf)
        return odds.index_copy_(0, some, found[:, 0]).view_as(active)

    def macs(self, agents: Tensor, removed: Tensor) -> Tensor:
        """Multiply-adds of one decision, see :meth:`tokenenv.Policy.macs`."""
        return self.actor.macs(agents) + agents * self.widths.own + self.widths.shared

    def check_fit(self, backbone: Backbone, name: str) -> None:
        """Raise :class:`UserError` unless the policy fits the model."""
        super().check_fit(backbone, name)
        given = self.rules.agent_dim(backbone), self.rules.shared_dim(backbone)
        if (self.widths.own, self.widths.shared) != given:
            raise UserError(
                f"the policy was trained for '{self.trained_on}' ({self.widths.own}+"
                f"{self.widths.shared} inputs) and model '{name}' gives {given[0]}+{given[1]}: "
                "use it with the model it was trained on, or train one for this model"
            )

    def config(self) -> dict[str, Any]:
        """All settings but the weights, as JSON."""
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
        """An untrained policy with the settings of :meth:`config`."""
        rules = remake(config.pop("rules"), RULES.values(), trust)
        widths = remake({"class": "Widths", **config.pop("widths")}, [Widths])
        check_annotated(config, cls.__init__)
        return cls(rules, widths, **config)


@torch.compiler.assume_constant_result
def _log_odds(probability: float) -> float:
    """Log-odds of a probability, as float32 has them."""
    return _logit(probability)


@cache
def _logit(probability: float) -> float:
    return torch.logit(torch.tensor(probability)).item()


def _difference(logits: Tensor) -> Tensor:
    """Log-odds ``(...)`` of the second of two actions from logits ``(..., 2)``."""
    return logits[..., 1] - logits[..., 0]
