"""What reducers have in common: rules of a game that nobody plays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenenv.errors import UserError
from tokenenv.game.checks import check_blocks, check_range
from tokenenv.game.rules.observation import Moment, Observation
from tokenenv.vit.backbone import Backbone, Context
from tokenenv.vit.tokens import Tokens


@dataclass(frozen=True)
class Reducer:
    """A fixed way to reduce tokens, as :class:`~tokenenv.game.rules.Rules` without agents.

    So it runs wherever rules do. A subclass says what it reads of the attention, and gives
    :meth:`reduce`.

    Attributes:
        blocks: indices of the blocks where tokens go, strictly increasing; between attention and
            MLP.
    """

    blocks: tuple[int, ...]
    between: ClassVar[bool] = True
    packed: ClassVar[bool] = False

    reads: ClassVar[tuple[str, ...]] = ()
    """What it needs of a block's attention: arguments of ``Backbone.attend``."""

    proportional: ClassVar[bool] = False
    """Whether a merged token weighs as many keys as its patches in attention."""

    def __post_init__(self) -> None:
        check_blocks(self.blocks)

    def reduce(self, tokens: Tokens, context: Context, step: int) -> Tokens:
        """What is left of the tokens.

        Args:
            tokens: ``(B, N)`` tokens after the attention of block ``blocks[step]``.
            context: of that attention; it holds what :attr:`reads` names.
            step: which of :attr:`blocks` it is.
        """
        raise NotImplementedError

    def work(self, backbone: Backbone, block: int, tokens: Tensor) -> Tensor:
        """Multiply-adds of :meth:`reduce` on ``tokens`` (float, prefix included)."""
        return torch.zeros_like(tokens)

    def check(self, backbone: Backbone) -> None:
        """Raise :class:`UserError` where this doesn't fit the backbone."""
        check_range(self.blocks, backbone.depth)
        if "cls_attention" in self.reads and not backbone.has_class_token:
            raise UserError(
                f"{type(self).__name__} reads the class token's attention and this model has no "
                "class token: choose a method without it, such as tome or pitome"
            )

    def wants(self, block: int) -> dict[str, bool]:
        """What the attention of ``block`` has to do: arguments of ``Backbone.attend``."""
        due = block in self.blocks
        return {**dict.fromkeys(self.reads, due), "proportional": self.proportional}

    def macs(self, backbone: Backbone, block: int, tokens: Tensor) -> Tensor:
        """Multiply-adds of reading the attention and of :meth:`reduce`."""
        width, total = backbone.attention_dim(block), self.work(backbone, block, tokens)
        if "cls_attention" in self.reads:
            total = total + tokens * width
        if "matrix" in self.reads:
            total = total + tokens**2 * width
        return total

    def apply(self, moment: Moment, action: Tensor) -> Tokens:
        """:meth:`reduce`; there is no action."""
        # What is compared is compared in full precision, also where the model computes in half.
        with torch.autocast(moment.tokens.x.device.type, enabled=False):
            return self.reduce(moment.tokens, moment.context, moment.step)

    def observe(self, backbone: Backbone, moment: Moment, *, state: bool = False) -> Observation:
        """Nothing, for nobody."""
        batch, x = len(moment.tokens.x), moment.tokens.x
        none = x.new_zeros(batch, 0, dtype=torch.float32)
        active = x.new_zeros(batch, 0, dtype=torch.bool)
        return Observation(none[..., None], none, active, moment.step, {}, state=none)

    def match(self, tokens: Tokens, context: Context) -> None:
        """Whatever merges is :meth:`reduce`'s business."""

    def agents(self, backbone: Backbone) -> int:
        """None."""
        return 0

    def actions(self, backbone: Backbone) -> int:
        """None."""
        return 0

    def layout(self, backbone: Backbone) -> dict[str, slice]:
        """Nothing is seen."""
        return {}

    def agent_dim(self, backbone: Backbone) -> int:
        """Nothing is seen."""
        return 0

    def shared_dim(self, backbone: Backbone) -> int:
        """Nothing is seen."""
        return 0

    def state_dim(self, backbone: Backbone) -> int:
        """Nothing is seen."""
        return 0

    def to_roster(self, backbone: Backbone, tokens: Tokens, values: Tensor) -> Tensor:
        """The roster is empty."""
        return values

    def from_roster(self, tokens: Tokens, values: Tensor) -> Tensor:
        """The roster is empty."""
        return values

    def deciders(self, visual: Tensor) -> Tensor:
        """Nobody."""
        return torch.zeros_like(visual)


def share_of(count: Tensor, keep: float | Tensor) -> Tensor:
    """``ceil(keep n)``, float64, of numbers of tokens; as :func:`share` rounds."""
    return (count.double() * keep - _ROUNDING).ceil()


def share(count: int, keep: float) -> int:
    """``ceil(keep n)``: 10 tokens of 100 at ``keep=0.1``, whatever the last digit of 0.1 is."""
    return math.ceil(count * keep - _ROUNDING)


_ROUNDING = 1e-9


def check_numbers(name: str, numbers: tuple[int, ...], blocks: tuple[int, ...], least: int) -> None:
    """Raise :class:`UserError` unless there is a whole number from ``least`` for each block."""
    words = "/".join(map(str, numbers))
    if len(numbers) != len(blocks):
        raise UserError(
            f"{name}={words} gives {len(numbers)} numbers for {len(blocks)} blocks: "
            "give one for all, or one for each"
        )
    if min(numbers) < least:
        raise UserError(f"{name}={words}: give whole numbers from {least}")
