"""DORA-pruning's actor: whether to prune, how many tokens, which (arXiv 2609.34325, "Actor")."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from agents.policies.trainable import Columns, Head, Trainable, columns
from agents.workers import WHOLE, Rows
from tokenenv.artefact import check_annotated
from tokenenv.errors import UserError, check_choice
from tokenenv.game.checks import check_threshold
from tokenenv.game.rules import LayerPrune, Observation
from tokenenv.game.rules.layer_prune import LEAST
from tokenenv.game.stored import describe, remake
from tokenenv.vit.backbone import Backbone

_NEVER = -1e9


Selector = Literal["learned", "random", "redundancy"]


class GatedPolicy(Trainable):
    """Gate, budget and selector of one agent per block.

    The gate reads the class token's key and the history. Only if it opens, an encoder reads the
    keys of all tokens left; the budget is read from its class token, the selector's scores from its
    other tokens. Parameters are shared by all blocks, and each block has embeddings of its own.

    There are four departures from the paper, because training here has some hundred images and
    not 300,000. (1) Gate and budget are initialised near a given schedule (in the paper both are
    flat), and a linear layer from the block to the budget adapts it quickly. (2) If the rules have
    a suitable feature, the scores are initialised by it (:meth:`lean_on`), with a weight per block.
    (3) Each pick of the selector has its own PPO ratio, because the ratio of the product of all
    picks explodes with their number. (4) The class token enters the encoder by a projection of its
    own: what an agent's token is described by may be other features than its key, and then has
    another width.

    Args:
        rules: :class:`~tokenenv.game.rules.LayerPrune` with ``action="tokens"``.
        widths: key width, width F of an agent's own features, number of patches P.
        width: width of the encoder; in the paper 128 for a model of width 768.
        initial_gate: probability of an open gate before training.
        initial_budget: number of tokens pruned by an open gate before training, give or take a
            third; one for all blocks, or one for each.
        selector: ``learned``; ``random``: random tokens; ``redundancy``: only the feature of
            :meth:`lean_on`.
        threshold: the gate is open if its probability is at least this.
        trained_on: timm's name of the backbone it is trained on.

    Raises:
        UserError: an unknown selector, or a threshold that is no probability between 0 and 1.
    """

    budgets: Tensor

    def __init__(
        self,
        rules: LayerPrune,
        widths: dict[str, int],
        *,
        width: int = 32,
        initial_gate: float = 0.2,
        initial_budget: tuple[float, ...] = (12.0,),
        selector: Selector = "learned",
        threshold: float = 0.5,
        trained_on: str = "",
    ) -> None:
        super().__init__()
        check_choice("selector", selector, Selector)
        self.rules, self.widths, self.width = rules, widths, width
        self.chooser, self.threshold = selector, check_threshold(threshold)
        self.trained_on = trained_on
        learned = ("selector",) if selector == "learned" else ()
        self.heads: tuple[str, ...] = ("gate", "budget", *learned)
        key, own, steps = widths["key"], widths["own"], len(rules.blocks)
        budgets = torch.tensor(rules.budgets(widths["patches"])[1:])
        self.register_buffer("budgets", budgets, persistent=False)
        self.gate_block = nn.Linear(steps, 16, bias=False)
        self.gate = nn.Sequential(nn.Linear(key + 16 + 3, 64), nn.SiLU(), nn.Linear(64, 1))
        self.enter_class = nn.Linear(key, width)
        self.enter = nn.Linear(own, width)
        self.block = nn.Linear(steps, width, bias=False)
        self.history = nn.Linear(3, width, bias=False)
        # Four heads as in the paper, fewer if a head would be narrower than eight.
        heads = next(h for h in (4, 2, 1) if width % h == 0 and (width // h >= 8 or h == 1))
        self.encoder = nn.TransformerEncoderLayer(
            width, heads, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.budget = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, len(budgets))
        )
        self.budget_block = nn.Linear(steps, len(budgets), bias=False)
        self.count = nn.Linear(1, width, bias=False)
        self.selector = nn.Sequential(nn.Linear(width, 64), nn.SiLU(), nn.Linear(64, 1))
        self.skip = nn.Linear(steps, own, bias=False)
        nn.init.zeros_(self.skip.weight)
        near = torch.tensor(initial_budget).expand(steps)
        with torch.no_grad():
            self.budget_block.weight.copy_(-(((budgets[:, None] - near) * 3 / near) ** 2) / 2)
        closed = torch.logit(torch.tensor(initial_gate)).item()
        for module, bias in (
            (self.gate, closed),
            (self.budget, 0.0),
            (self.selector, 0.0),
        ):
            _start_at(module, bias)

    def lean_on(self, feature: slice, slope: float) -> None:
        """Initialise the scores to rise by ``slope`` per unit of a feature; the highest prune."""
        with torch.no_grad():
            self.skip.weight[feature] = slope

    @property
    def strict(self) -> int:
        """-1: a higher threshold opens fewer gates, and so removes fewer tokens."""
        return -1

    def draw(
        self, seen: Columns, generator: torch.Generator, rows: Rows = WHOLE
    ) -> tuple[Tensor, Columns]:
        """Sample actions for ``rows`` of a batch.

        Returns:
            ``(B, A)`` actions, 0 for tokens to prune; and the choice: ``gate (B, 1)`` bool,
            ``budget (B, 1)`` index, ``order (B, A)`` agents in the order sampled, ``share (B, 1)``
            of the tokens left that is pruned.
        """
        gate_logit, feasible = self._gate(seen)

        uniform = rows.rand(gate_logit.shape, generator)
        gate = (uniform < gate_logit.sigmoid()) & feasible.any(1, keepdim=True)
        opened = gate[:, 0].nonzero()[:, 0]
        open_rows = Rows.of(rows.workers, len(opened))

        def noise(like: Tensor) -> Tensor:
            uniform = open_rows.rand(like.shape, generator)
            return -(-uniform.clamp(min=1e-20).log()).log()

        open_ = {name: tensor[opened] for name, tensor in seen.items()}
        z = self._encode(open_)
        logits = self._budget_logits(z, open_, feasible[opened])
        budget = (logits + noise(logits)).argmax(1, keepdim=True)
        count = self.budgets[budget]
        score = self._scores(z, open_, count)
        if self.chooser != "redundancy":
            score = score + noise(score)
        # Gumbel top-k is an ordered sample without replacement (Plackett-Luce).
        order = score.sort(stable=True, dim=1, descending=True).indices
        left = open_["active"].sum(1, keepdim=True)

        def everywhere(values: Tensor) -> Tensor:
            return values.new_zeros(len(gate), *values.shape[1:]).index_copy(0, opened, values)

        choice = {
            "gate": gate,
            "budget": everywhere(budget),
            "order": everywhere(order),
            "share": everywhere(count / left),
        }
        action = torch.ones_like(seen["active"], dtype=torch.long)
        return action.index_copy(0, opened, self._action(order, count)), choice

    def score(self, seen: Columns, choice: Columns) -> dict[str, Head]:
        """Log-probabilities of gate and budget ``(B, 1)``, and of each pick ``(B, A)``."""
        gate_logit, feasible = self._gate(seen)
        gate = choice["gate"]
        chances = nn.functional.logsigmoid(torch.cat([-gate_logit, gate_logit], 1))
        entropy = -(chances.exp() * chances).sum(1, keepdim=True)
        possible = feasible.any(1, keepdim=True)
        found = {"gate": Head(chances.gather(1, gate.long()), entropy, possible)}

        # Encode only rows with an open gate; in most blocks of most images it is closed.
        rows = gate[:, 0].nonzero()[:, 0]
        open_ = {name: tensor[rows] for name, tensor in seen.items()}
        budget, order = choice["budget"][rows], choice["order"][rows]
        z = self._encode(open_)

        def everywhere(values: Tensor) -> Tensor:
            return values.new_zeros(len(gate), values.shape[1]).index_copy(0, rows, values)

        logits = self._budget_logits(z, open_, feasible[rows]).log_softmax(1)
        entropy = -(logits.exp() * logits).sum(1, keepdim=True)
        found["budget"] = Head(everywhere(logits.gather(1, budget)), everywhere(entropy), gate)
        if self.chooser != "learned":
            return found
        count = self.budgets[budget]
        score = self._scores(z, open_, count)
        picks = torch.arange(score.shape[1], device=score.device) < count
        log_prob = torch.where(picks, plackett_luce(score.gather(1, order)), 0.0)
        spread = score.log_softmax(1)
        entropy = -(spread.exp() * spread).sum(1, keepdim=True).expand_as(log_prob)
        found["selector"] = Head(everywhere(log_prob), everywhere(entropy), everywhere(picks))
        return found

    @torch.no_grad()
    def act(self, observation: Observation) -> Tensor:
        """The deterministic actions ``(B, A)``: gate by threshold, likeliest budget, top scores."""
        seen = columns(observation)
        gate_logit, feasible = self._gate(seen)
        gate = gate_logit >= torch.logit(torch.tensor(self.threshold)).item()
        gate = gate & feasible.any(1, keepdim=True)
        action = torch.ones_like(seen["active"], dtype=torch.long)
        rows = gate[:, 0].nonzero()[:, 0]
        if not len(rows):
            return action
        open_ = {name: tensor[rows] for name, tensor in seen.items()}
        z = self._encode(open_)
        budget = self._budget_logits(z, open_, feasible[rows]).argmax(1, keepdim=True)
        count = self.budgets[budget]
        score = self._scores(z, open_, count)
        if self.chooser == "random":  # depends on the decision only, so it needs no saved state
            dice = torch.Generator(score.device).manual_seed(observation.step)
            score = score + torch.rand(score.shape, generator=dice, device=score.device)
        order = score.sort(stable=True, dim=1, descending=True).indices
        return action.index_copy(0, rows, self._action(order, count))

    @torch.no_grad()
    def chances(self, observation: Observation) -> Tensor:
        """``(B, 1)`` probability of an open gate: of pruning anything in this block."""
        return self._gate(columns(observation))[0].sigmoid()

    def macs(self, agents: Tensor, removed: Tensor) -> Tensor:
        """Multiply-adds of one decision; the encoder's only where tokens were removed."""
        key, own, w = self.widths["key"], self.widths["own"], self.width
        steps = len(self.rules.blocks)
        gate = steps * 16 + (key + 16 + 3) * 64 + 64
        n = agents + 1
        encoder = agents * own * w + key * w + steps * w + 3 * w
        encoder = encoder + n * (4 * w * w + 2 * w * 2 * w) + 2 * n * n * w
        heads = w * w + w * len(self.budgets) + w + agents * (w * 64 + 64 + own)
        heads = heads + steps * (own + len(self.budgets))
        return gate + torch.where(removed > 0, encoder + heads, torch.zeros_like(agents))

    def rates(self) -> list[tuple[list[nn.Parameter], float]]:
        """Parameter groups with the paper's relative rates: gate and budget 1, others 0.4."""
        parts = (self.gate, self.gate_block, self.budget, self.budget_block)
        fast = [p for part in parts for p in part.parameters()]
        known = {id(p) for p in fast}
        return [(fast, 1.0), ([p for p in self.parameters() if id(p) not in known], 0.4)]

    def shared(self) -> tuple[list[nn.Parameter], tuple[str, str]] | None:
        """The encoder's parameters, which budget and selector share."""
        if self.chooser != "learned":
            return None
        modules = (self.enter_class, self.enter, self.block, self.history, self.encoder)
        return [p for m in modules for p in m.parameters()], ("budget", "selector")

    def check_fit(self, backbone: Backbone, name: str) -> None:
        """Raise :class:`UserError` unless the policy fits the model."""
        super().check_fit(backbone, name)
        mine = (self.widths["own"], self.widths["key"] + len(self.rules.blocks) + 3)
        given = self.rules.agent_dim(backbone), self.rules.shared_dim(backbone)
        if mine != given:
            raise UserError(
                f"the policy was trained for '{self.trained_on}' ({mine[0]}+{mine[1]} inputs) and "
                f"model '{name}' gives {given[0]}+{given[1]}: use it with the model it was "
                "trained on, or train one for this model"
            )

    def config(self) -> dict[str, Any]:
        """All settings but the weights, as JSON."""
        return {
            "class": "GatedPolicy",
            "rules": describe(self.rules),
            "widths": self.widths,
            "width": self.width,
            "selector": self.chooser,
            "threshold": self.threshold,
            "trained_on": self.trained_on,
        }

    @classmethod
    def remade(cls, config: dict[str, Any], trust: bool = False) -> GatedPolicy:
        """An untrained policy with the settings of :meth:`config`."""
        rules = remake(config.pop("rules"), [LayerPrune], trust)
        check_annotated(config, cls.__init__)
        return cls(rules, config.pop("widths"), **config)

    def _split(self, seen: Columns) -> tuple[Tensor, Tensor, Tensor]:
        """The shared features split: class token's key, one-hot block, history."""
        key, steps = self.widths["key"], len(self.rules.blocks)
        shared = seen["shared"]
        return shared[:, :key], shared[:, key : key + steps], shared[:, key + steps :]

    def _gate(self, seen: Columns) -> tuple[Tensor, Tensor]:
        """``(B, 1)`` log-odds of an open gate, ``(B, M)`` bool feasible budgets."""
        key, block, history = self._split(seen)
        logit = self.gate(torch.cat([key, self.gate_block(block), history], 1))
        left = seen["active"].sum(1, keepdim=True)
        return logit, self.budgets <= (left - LEAST)

    def _encode(self, seen: Columns) -> Tensor:
        """``(B, 1 + A, width)``: class token, then the agents."""
        key, block, history = self._split(seen)
        first = self.enter_class(key) + self.history(history)
        x = torch.cat([first[:, None], self.enter(seen["agents"])], 1) + self.block(block)[:, None]
        dead = torch.cat([torch.zeros_like(seen["active"][:, :1]), ~seen["active"]], 1)
        if not len(x):  # all gates are closed, and torch's attention needs at least one row
            return x
        return self.encoder(x, src_key_padding_mask=dead)

    def _budget_logits(self, z: Tensor, seen: Columns, feasible: Tensor) -> Tensor:
        logits = self.budget(z[:, 0]) + self.budget_block(self._split(seen)[1])
        return logits.masked_fill(~feasible, _NEVER)

    def _scores(self, z: Tensor, seen: Columns, count: Tensor) -> Tensor:
        """``(B, A)`` scores, the highest are pruned; lowest for agents that may not act."""
        if self.chooser == "random":  # equal scores; the caller adds random numbers
            return z.new_zeros(seen["active"].shape).masked_fill(~seen["active"], _NEVER)
        direct = (seen["agents"] @ self.skip(self._split(seen)[1])[..., None])[..., 0]
        if self.chooser == "redundancy":
            return direct.masked_fill(~seen["active"], _NEVER)
        left = seen["active"].sum(1, keepdim=True).clamp(min=1)
        told = z[:, 1:] + self.count((count / left).float())[:, None]
        score = self.selector(told)[..., 0] + direct
        return score.masked_fill(~seen["active"], _NEVER)

    def _action(self, order: Tensor, count: Tensor) -> Tensor:
        leaves = torch.arange(order.shape[1], device=order.device) < count
        return torch.ones_like(order).scatter(1, order, (~leaves).long())


def _start_at(network: nn.Sequential, bias: Tensor | float) -> None:
    """Initialise a layer so that its output is near ``bias``."""
    last = network[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight.mul_(0.01)
        last.bias.copy_(torch.as_tensor(bias))


def plackett_luce(score: Tensor) -> Tensor:
    """Log-probability of each pick of an ordered sample without replacement.

    ``log pi_S = sum_t [s_t - log sum_(j in R_t) exp(s_j)]``, where ``R_t`` are the entries not
    picked before (arXiv 2609.34325, "Sampling").

    Args:
        score: ``(..., A)`` scores in the order picked; those never picked come last.

    Returns:
        ``(..., A)`` the terms of the sum.
    """
    rest = score.flip(-1).logcumsumexp(-1).flip(-1)
    return score - rest
