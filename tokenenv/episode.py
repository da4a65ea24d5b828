"""One batch of images on its way through the model, decision by decision."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokenenv import reduction
from tokenenv.backbone import Backbone, Context
from tokenenv.errors import UserError
from tokenenv.rules import Observation, TokenPrune

Execution = Literal["masked", "padded"]
EXECUTIONS = ("masked", "padded")


def default_execution(device: torch.device) -> Execution:
    """Padded on a CPU, where it saves time; masked elsewhere, where counts would be waited for."""
    return "padded" if device.type == "cpu" else "masked"


class Episode:
    """``B`` images from their embedding to their logits under one set of rules.

    The model runs up to the next decision, waits for an action, and goes on.

    Args:
        backbone: the model.
        rules: who decides what and where.
        images: ``(B, C, H, W)`` normalised images on the backbone's device.
        execution: ``masked``: nothing moves, dead tokens are hidden from attention (no saving, no
            host-device sync). ``padded``: the living tokens are compacted to the longest image of
            the batch. Both give the same logits, and the same decisions of a policy that does not
            draw at random.

    Attributes:
        tokens: the state now.
        step: number of decisions taken.
        logits: ``(B, classes)`` once :attr:`done`, else None.
        lengths: ``(B,)`` living tokens, prefix included, of each block run so far.
    """

    def __init__(
        self, backbone: Backbone, rules: TokenPrune, images: Tensor, *, execution: Execution
    ) -> None:
        if execution not in EXECUTIONS:
            raise UserError(f"execution='{execution}': choose from {', '.join(EXECUTIONS)}")
        self.backbone, self.rules, self.execution = backbone, rules, execution
        self.tokens = backbone.embed(images)
        self.step = 0
        self.logits: Tensor | None = None
        self.lengths: list[Tensor] = []
        self._count = self.tokens.counts()
        self._context = Context()
        self._block = 0
        self._advance()

    @property
    def done(self) -> bool:
        """Whether the logits are there."""
        return self.logits is not None

    def observe(self, *, state: bool = False) -> Observation:
        """What the agents see, over the visual tokens as they lie now: ``A = N - prefix``."""
        return self.rules.observe(self.backbone, self.tokens, self.step, self._context, state=state)

    def act(self, action: Tensor) -> None:
        """Apply ``action`` ``(B, N - prefix)`` and run on to the next decision or the logits."""
        self.tokens = self.rules.apply(self.tokens, action)
        self._count = self.tokens.counts()
        if self.execution == "padded":
            self.tokens = reduction.compact(self.tokens)
        self.step += 1
        self._advance()

    def _advance(self) -> None:
        backbone, rules = self.backbone, self.rules
        stop = rules.blocks[self.step] if self.step < len(rules.blocks) else backbone.depth
        for block in range(self._block, stop):
            self.tokens, self._context = backbone.attend(block, self.tokens, **rules.wants(block))
            self.tokens = backbone.feed(block, self.tokens)
            self.lengths.append(self._count)
        self._block = stop
        if stop == backbone.depth:
            self.logits = backbone.classify(self.tokens)
