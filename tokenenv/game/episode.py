"""One batch of images on its way through the model, decision by decision."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokenenv.errors import UserError
from tokenenv.game.reduction import Moment, Reduction
from tokenenv.game.rules.base import Rules
from tokenenv.game.rules.observation import Observation
from tokenenv.vit import packing
from tokenenv.vit.backbone import Backbone, Context
from tokenenv.vit.reduction import Match
from tokenenv.vit.tokens import Tokens

Execution = Literal["masked", "padded", "packed"]
EXECUTIONS = ("masked", "padded", "packed")


def default_execution(device: torch.device) -> Execution:
    """Packed on a CPU, where it saves most; masked elsewhere, where counts would be waited for."""
    return "packed" if device.type == "cpu" else "masked"


class Episode:
    """``B`` images on their way from their embedding to their logits; :meth:`start` makes one.

    The model runs up to the next decision, waits for an action, and goes on.

    Attributes:
        backbone: the model.
        reduction: where decisions fall, and what they do.
        execution: see :meth:`start`.
        tokens: the state now; packed where that is how they run and the reduction takes them so.
        moment: the decision that is due; until :attr:`done`.
        step: number of decisions taken.
        logits: ``(B, classes)`` once :attr:`done`, else None.
        counts: ``(B,)`` visual tokens before the first decision and after each one so far.
        attended, fed: ``(B,)`` living tokens, prefix included, that the attention and the MLP
            of each block run so far worked on.
    """

    moment: Moment

    def __init__(
        self, backbone: Backbone, reduction: Reduction, tokens: Tokens, execution: Execution
    ) -> None:
        self.backbone, self.reduction, self.execution = backbone, reduction, execution
        # A single image needs no packing: its tokens just leave.
        self._packed = execution == "packed" and reduction.packed and len(tokens.x) > 1
        self.tokens = packing.end_to_end(tokens) if self._packed else tokens
        self.step = 0
        self.logits: Tensor | None = None
        self.attended: list[Tensor] = []
        self.fed: list[Tensor] = []
        self._count = tokens.counts()
        self.counts: tuple[Tensor, ...] = (self._count - tokens.prefix,)
        self._context = Context()
        self._half = 0

    @staticmethod
    def start(
        backbone: Backbone, reduction: Reduction, images: Tensor, *, execution: Execution
    ) -> Episode:
        """Embed images and run the model up to the first decision, or to the logits.

        Args:
            backbone: the model.
            reduction: where decisions fall, and what they do.
            images: ``(B, C, H, W)`` normalised images on the backbone's device.
            execution: ``masked``: nothing moves, dead tokens are hidden from attention (no saving,
                no host-device sync). ``padded``: the living tokens are compacted to the longest
                image of the batch. ``packed``: every image goes on at its own length; between
                decisions the living tokens of all lie end to end. All give the same logits, and
                the same decisions of a policy that does not draw at random.

        Raises:
            UserError: an unknown execution.
        """
        if execution not in EXECUTIONS:
            raise UserError(f"execution='{execution}': choose from {', '.join(EXECUTIONS)}")
        episode = Episode(backbone, reduction, backbone.embed(images), execution)
        episode._advance()
        return episode

    @property
    def done(self) -> bool:
        """Whether the logits are there."""
        return self.logits is not None

    def observe(self, *, state: bool = False) -> Observation:
        """What the agents see, as the tokens lie now; for rules, which have agents.

        ``state``: whether to add the image's global state.
        """
        assert isinstance(self.reduction, Rules)
        return self.reduction.observe(self.backbone, self.moment, state=state)

    def act(self, action: Tensor | None) -> None:
        """Apply ``action``, as the tokens lie now, and run on to the next decision or the end.

        ``action``: None for a reduction without agents.
        """
        self.tokens = self.reduction.apply(self.moment, action)
        del self.moment  # keys and old tokens: memory that the next blocks can use
        self._context = Context()
        self._count = self.tokens.counts()
        self.counts = (*self.counts, self._count - self.tokens.prefix)
        if self.execution == "padded":
            self.tokens = packing.compact(self.tokens)
        elif self.execution == "packed":
            self.tokens = packing.pack(self.tokens)
        self.step += 1
        self._advance()

    def finish(self, rows: Tensor) -> Tensor:
        """``(b, classes)`` logits of some images if nothing more were removed from here on.

        The stored state goes on, nothing is computed anew; the episode stays where it is.
        ``rows``: ``(b,)`` which images.
        """
        if self.logits is not None:
            return self.logits[rows]
        tokens = packing.unpack(self.tokens).select(rows)
        if self.execution == "packed":
            tokens = packing.pack(tokens)
        for half in range(self._half, 2 * self.backbone.depth):
            tokens, _ = self._run(half, tokens)
        return self.backbone.classify(packing.unpack(tokens))

    def _advance(self) -> None:
        """Run to the next decision, or to the logits."""
        reduction, backbone = self.reduction, self.backbone
        decisions_left = self.step < len(reduction.blocks)
        # Half 2 b is the attention of block b, half 2 b + 1 its MLP.
        stop = 2 * (reduction.blocks[self.step] if decisions_left else backbone.depth)
        if decisions_left and reduction.between:
            stop += 1
        for half in range(self._half, stop):
            self.tokens, context = self._run(half, self.tokens)
            if half % 2 == 0:
                self._context = context
                self.attended.append(self._count)
            else:
                self.fed.append(self._count)
        if not (decisions_left and self._packed):
            self.tokens = packing.unpack(self.tokens)
        self._half = stop
        if decisions_left:
            match = self._prepare()
            self.moment = Moment(self.tokens, self.step, self._context, self.counts, match)
        else:
            self.logits = backbone.classify(self.tokens)

    def _prepare(self) -> Match | None:
        device = self.tokens.x.device.type
        if not torch.is_autocast_enabled(device):  # entering and leaving it takes its time
            return self.reduction.prepare(self.tokens, self._context)
        with torch.autocast(device, enabled=False):
            return self.reduction.prepare(self.tokens, self._context)

    def _run(self, half: int, tokens: Tokens) -> tuple[Tokens, Context]:
        block, mlp = divmod(half, 2)
        if mlp:
            return self.backbone.feed(block, tokens), Context()
        return self.backbone.attend(block, tokens, **self.reduction.wants(block))
