"""One forward pass of a batch of images that stops at each decision for an action."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from tokenenv.errors import check_choice
from tokenenv.game.reduction import Moment, Reduction
from tokenenv.game.rules.base import Rules
from tokenenv.game.rules.observation import Observation
from tokenenv.vit import hooks, packing
from tokenenv.vit.backbone import Backbone, Context
from tokenenv.vit.reduction import Match
from tokenenv.vit.tokens import Tokens

R = TypeVar("R")
Execution = Literal["masked", "padded", "packed"]
EXECUTIONS = ("masked", "padded", "packed")


def default_execution(device: torch.device) -> Execution:
    """``packed`` on a CPU, where it is fastest; else ``masked``, without host-device syncs."""
    return "packed" if device.type == "cpu" else "masked"


class Episode:
    """The forward pass of ``B`` images in parts.

    The model embeds the images, runs up to the next decision, waits for an action, and goes on.

    Args:
        backbone: the model.
        reduction: in which blocks decisions are due, and what they do.
        images: ``(B, C, H, W)`` normalised images on the backbone's device.
        execution: ``masked``: removed tokens stay in memory and attention masks them (no saving, no
            host-device sync). ``padded``: removed tokens are cut out, and all images are padded to
            the longest of the batch. ``packed``: images of about the same length lie in groups,
            each padded to its longest. All three give the same logits and the same decisions of a
            deterministic policy.
        only_logits: whether nothing but the logits will be read afterwards. The last block is then
            computed only for the tokens that the head reads, a decision in it that they don't
            depend on is left out, and nobody keeps track of patches.
        known: whether :meth:`act` will be told the number of tokens left by every decision; the
            whole pass can then be compiled as one graph.
        after_block: called with each block's index and the tokens after it, unless None.

    Where hooks look into blocks, ``packed`` runs ``padded`` and ``only_logits`` has no effect.

    Attributes:
        backbone, reduction, after_block: as given.
        execution: how it runs.
        tokens: the state now; packed if ``execution`` is and the reduction takes packed tokens.
        moment: the state at the decision that is due; not there once :attr:`done`.
        step: number of decisions taken.
        logits: ``(B, classes)`` once :attr:`done`, else None.
        counts: ``(B,)`` visual tokens before the first decision and after each one so far.
        attended, fed: for each block run so far, ``(B,)`` tokens in its attention and in its MLP,
            prefix included.

    Raises:
        UserError: an unknown execution.
    """

    moment: Moment

    def __init__(
        self,
        backbone: Backbone,
        reduction: Reduction,
        images: Tensor,
        *,
        execution: Execution,
        only_logits: bool = False,
        known: bool = False,
        after_block: Callable[[int, Tokens], object] | None = None,
    ) -> None:
        check_choice("execution", execution, Execution)
        if not torch.compiler.is_compiling():
            backbone.warn_of_unheard()
            if backbone.watched:  # hooks expect (B, N, D), and all blocks to run
                execution, only_logits = "padded" if execution == "packed" else execution, False
        tokens = backbone.embed(images, trace=reduction.traces or not only_logits)
        self.after_block = after_block
        # torch.export can't follow the host's choice of groups; it traces a single image.
        self._packed = execution == "packed" and (known or not torch.compiler.is_compiling())
        count = tokens.counts()
        self._begin(backbone, reduction, execution, tokens, (count - tokens.prefix,), only_logits)
        if self._packed:
            self.tokens = packing.end_to_end(tokens)
        self._advance()

    @classmethod
    def resumed(
        cls, backbone: Backbone, reduction: Reduction, tokens: Tokens, counts: tuple[Tensor, ...]
    ) -> Episode:
        """The episode of padded tokens from the last decision on, for which only logits are read.

        Args:
            backbone: the model.
            reduction: what reduces its tokens.
            tokens: the tokens after that decision.
            counts: as the attribute of that name.
        """
        made = cls.__new__(cls)
        made.after_block, made._packed, made._given = None, False, tokens.x
        made._begin(backbone, reduction, "padded", tokens, counts, only_logits=True)
        made.step = len(counts) - 1
        block = reduction.blocks[made.step - 1]
        made._half = 2 * block + int(reduction.between)
        made._advance()
        return made

    def _begin(
        self,
        backbone: Backbone,
        reduction: Reduction,
        execution: Execution,
        tokens: Tokens,
        counts: tuple[Tensor, ...],
        only_logits: bool,
    ) -> None:
        """Set the attributes of a pass that stands before its first block."""
        self.backbone, self.reduction, self.execution = backbone, reduction, execution
        self.tokens, self.counts = tokens, counts
        self._count = counts[-1] + tokens.prefix
        self.step = 0
        self.logits: Tensor | None = None
        self.attended: list[Tensor] = []
        self.fed: list[Tensor] = []
        self._context = Context()
        self._half = 0
        self._short = only_logits and backbone.reads_prefix
        self._blocks = reduction.blocks
        last = backbone.depth - 1
        if self._short and reduction.keeps_prefix and reduction.between and last in self._blocks:
            self._blocks = self._blocks[:-1]  # it would change nothing that the head reads

    @property
    def done(self) -> bool:
        """Whether the last decision was taken and the logits are computed."""
        return self.logits is not None

    def copy(self) -> Episode:
        """An episode in the same state that goes on by itself; it shares the tensors."""
        twin = copy(self)
        twin.attended, twin.fed = list(self.attended), list(self.fed)
        return twin

    def observe(self, *, state: bool = False) -> Observation:
        """What the agents observe, in the current order of the tokens; only if there are agents.

        Args:
            state: whether to add the image's global state.
        """
        assert isinstance(self.reduction, Rules)
        return self.reduction.observe(self.backbone, self.moment, state=state)

    def act(self, action: Tensor | None, left: int | None = None) -> None:
        """Apply an action and run the model up to the next decision, or to the logits.

        Args:
            action: as :meth:`Reduction.apply` takes it; None for a reduction without agents.
            left: number of visual tokens that every image has afterwards if that is known; packed
                execution then doesn't wait for the device to tell.
        """
        if left is not None and self.execution != "masked":
            left += self.tokens.prefix
            self.moment = replace(self.moment, left=left)
        self.tokens = self._in_float32(lambda: self.reduction.apply(self.moment, action))
        del self.moment  # keys and old tokens: memory that the next blocks can use
        self._context = Context()
        self._count = self.tokens.counts()
        self.counts = (*self.counts, self._count - self.tokens.prefix)
        if self._packed:
            self.tokens = packing.pack(self.tokens, left)
        elif self.execution != "masked":
            self.tokens = packing.compact(self.tokens, left)
        self.step += 1
        self._advance()

    def skip(self) -> None:
        """Run the model up to the next decision, or to the logits; this one removes nothing."""
        del self.moment
        self._context = Context()
        self.counts = (*self.counts, self._count - self.tokens.prefix)
        self.step += 1
        self._advance()

    def select(self, rows: Tensor) -> Episode:
        """An episode of some of the images, at the decision that is due, that goes on by itself.

        Args:
            rows: ``(b,)`` indices of the images; one may be there several times.
        """
        twin, moment = self.copy(), self.moment
        twin.tokens = packing.unpack(self.tokens).select(rows)
        twin.attended = [count[rows] for count in self.attended]
        twin.fed = [count[rows] for count in self.fed]
        twin.counts = tuple(count[rows] for count in self.counts)
        twin._count = self._count[rows]
        known = {name: value for name, value in vars(moment.context).items() if value is not None}
        twin._context = Context(**{name: value[rows] for name, value in known.items()})
        match = moment.match
        twin.moment = Moment(
            twin.tokens,
            self.step,
            twin._context,
            twin.counts,
            None if match is None else Match(*(part[rows] for part in match)),
        )
        return twin

    def finish(self, rows: Tensor) -> Tensor:
        """The logits of some images if no further token were removed.

        Runs the remaining blocks from the current tokens; the episode itself does not change.

        Args:
            rows: ``(b,)`` indices of the images.

        Returns:
            ``(b, classes)`` logits.
        """
        if self.logits is not None:
            return self.logits[rows]
        tokens = packing.unpack(self.tokens).select(rows)
        if self._packed:
            tokens = packing.pack(tokens)
        for half in range(self._half, 2 * self.backbone.depth):
            tokens, _ = self._run(half, tokens, seen=False)
        return self.backbone.classify(packing.unpack(tokens))

    def _advance(self) -> None:
        """Run the model up to the next decision, or to the logits."""
        reduction, backbone = self.reduction, self.backbone
        decisions_left = self.step < len(self._blocks)
        # Half 2 b is the attention of block b, half 2 b + 1 its MLP.
        stop = 2 * (self._blocks[self.step] if decisions_left else backbone.depth)
        if decisions_left and reduction.between:
            stop += 1
        short = self._short and not decisions_left and self._half <= stop - 2
        end, half = stop - 2 if short else stop, self._half
        while half < end:
            block, mlp = divmod(half, 2)
            if self._short and not mlp and half + 2 <= end and self._ran_whole(block):
                half += 2
                continue
            if not mlp:
                self._given = hooks.entering(backbone.blocks[block], self.tokens.x)
            self.tokens, context = self._run(half, self.tokens)
            half += 1
            if mlp:
                hooks.leaving(backbone.blocks[block], self._given, self.tokens.x)
                self._fed(block)
            else:
                self._context = context
                self.attended.append(self._count)
        self._half = stop
        if short:
            proportional = reduction.wants(backbone.depth - 1).get("proportional", False)
            self.logits = backbone.finish(self.tokens, proportional=proportional)
            self.attended.append(self._count)
            self.fed.append(self._count)
            return
        if not (decisions_left and reduction.packed):
            self.tokens = packing.unpack(self.tokens)
        if decisions_left:
            match = self._in_float32(lambda: self.reduction.prepare(self.tokens, self._context))
            self.moment = Moment(self.tokens, self.step, self._context, self.counts, match)
        else:
            self.logits = backbone.classify(self.tokens)

    def _ran_whole(self, block: int) -> bool:
        """Run a block as a whole, unless something reads its attention; whether it ran."""
        wants = {name for name, wanted in self.reduction.wants(block).items() if wanted}
        if wants - {"proportional"}:
            return False
        self.tokens = self.backbone.through(block, self.tokens, proportional=bool(wants))
        self.attended.append(self._count)
        self._fed(block)
        return True

    def _fed(self, block: int) -> None:
        if self.after_block is not None:
            self.after_block(block, self.tokens)
        self.fed.append(self._count)

    def _in_float32(self, decide: Callable[[], R]) -> R:
        device = self.tokens.x.device.type
        if not torch.is_autocast_enabled(device):  # the context manager takes time
            return decide()
        with torch.autocast(device, enabled=False):
            return decide()

    def _run(self, half: int, tokens: Tokens, *, seen: bool = True) -> tuple[Tokens, Context]:
        """A half of a block; ``seen``: whether anything reads the context of its attention."""
        block, mlp = divmod(half, 2)
        if mlp:
            return self.backbone.feed(block, tokens), Context()
        wants = self.reduction.wants(block)
        if not seen:  # what changes the tokens, not only the context
            wants = {name: wants[name] for name in ("proportional",) if name in wants}
        return self.backbone.attend(block, tokens, **wants)
