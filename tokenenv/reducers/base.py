"""The base class of reducers, and helpers that they share."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, get_type_hints

import torch
from torch import Tensor

from tokenenv.errors import UserError
from tokenenv.game.checks import check_blocks, check_range, spread_blocks
from tokenenv.game.episode import Episode
from tokenenv.game.policy import Method
from tokenenv.game.reduction import Moment, Reduction
from tokenenv.game.stored import describe
from tokenenv.vit.backbone import Backbone, Context
from tokenenv.vit.tokens import Tokens
from tokenenv.words import Words


@dataclass(frozen=True)
class Reducer(Method, Reduction):
    """A fixed method to reduce tokens, without agents. Subclasses are frozen dataclasses.

    A subclass defines :meth:`reduce`, and in :attr:`reads` what that needs of the attention.

    Attributes:
        blocks: indices of the blocks where tokens are removed, between attention and MLP;
            strictly increasing.
        reads: what it needs of a block's attention: arguments of ``Backbone.attend``.
        everywhere: whether it removes tokens in every block by default, and not in three of them.
        proportional: whether a merged token counts in attention as all its patches.
        usage: its words on the command line, and what it does, in one line.
        required: the fields that the command line must give.

    Raises:
        UserError: ``blocks`` are not strictly increasing indices.
    """

    blocks: tuple[int, ...]
    reads: ClassVar[tuple[str, ...]] = ()
    everywhere: ClassVar[bool] = False
    proportional: ClassVar[bool] = False
    usage: ClassVar[str] = ""
    required: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_blocks(self.blocks)

    def reduce(self, tokens: Tokens, context: Context, step: int) -> Tokens:
        """Remove tokens in one block.

        Args:
            tokens: ``(B, N)`` tokens after the attention of block ``blocks[step]``.
            context: the context of that attention, with what :attr:`reads` names.
            step: which of :attr:`blocks` it is, from 0.

        Returns:
            The tokens after the reduction.
        """
        raise NotImplementedError

    @classmethod
    def default_blocks(cls, depth: int) -> tuple[int, ...]:
        """The default blocks for a model of ``depth`` blocks: all, or 3, 6 and 9 of 12."""
        return tuple(range(depth)) if cls.everywhere else spread_blocks(depth)

    @classmethod
    def from_words(cls, words: Words, depth: int) -> Reducer:
        """The reducer named by a user's words, for a model of ``depth`` blocks.

        Each field is an argument of the same name; a field named ``depth`` is set to ``depth``.

        Raises:
            UserError: an argument is missing, can't be read or is out of its range.
        """
        hints = get_type_hints(cls)
        made: dict[str, Any] = {"blocks": words.blocks(cls.default_blocks(depth))}
        for field in (field for field in fields(cls) if field.name != "blocks"):
            name = field.name
            optional = field.default is not MISSING or field.default_factory is not MISSING
            if name == "depth":
                made[name] = depth
            elif words.has(name):
                made[name] = words.value(name, hints[name], len(made["blocks"]))
            elif name in cls.required or not optional:
                raise words.missing(name)
        return cls(**made)

    def work(self, backbone: Backbone, block: int, tokens: Tensor) -> Tensor:
        """Multiply-adds of :meth:`reduce` itself; arguments as for :meth:`macs`."""
        return torch.zeros_like(tokens)

    @property
    def reduction(self) -> Reducer:
        """The reducer itself."""
        return self

    def next_action(self, episode: Episode) -> None:
        """None: a reducer takes no action."""

    def check(self, backbone: Backbone) -> None:
        """Raise :class:`UserError` if the reducer doesn't fit the backbone."""
        check_range(self.blocks, backbone.depth)
        if "cls_attention" in self.reads and not backbone.has_class_token:
            raise UserError(
                f"{type(self).__name__} reads the class token's attention and this model has no "
                "class token: choose a method without it, such as tome or pitome"
            )

    def wants(self, block: int) -> dict[str, bool]:
        """What the attention of ``block`` must return: arguments of ``Backbone.attend``."""
        due = block in self.blocks
        return {**dict.fromkeys(self.reads, due), "proportional": self.proportional}

    def macs(self, backbone: Backbone, block: int, tokens: Tensor) -> Tensor:
        """Multiply-adds of reading the attention and of :meth:`reduce`.

        Args:
            backbone: the model.
            block: one of :attr:`blocks`.
            tokens: float number of tokens, prefix included, any shape.

        Returns:
            As ``tokens``.
        """
        width, total = backbone.attention_dim(block), self.work(backbone, block, tokens)
        if "cls_attention" in self.reads:
            total = total + tokens * width
        if "matrix" in self.reads:
            total = total + tokens**2 * width
        return total

    def apply(self, moment: Moment, action: Tensor | None) -> Tokens:
        """:meth:`reduce`; there is no action."""
        found = self.reduce(moment.tokens, moment.context, moment.step)
        if not isinstance(found, Tokens):
            raise UserError(
                f"{type(self).__name__}.reduce returned {found!r:.40}: return tokens, as prune, "
                "merge and fuse of tokenenv.reduction give them"
            )
        return found

    def config(self) -> dict[str, Any]:
        """The class and its settings."""
        return describe(self)


def share_of(count: Tensor, keep: float | Tensor) -> Tensor:
    """``ceil(keep n)``, float64, for a tensor of token counts; rounded as in :func:`share`."""
    if not isinstance(keep, Tensor):  # an ONNX export rounds a plain number to float32
        keep = torch.tensor(keep, dtype=torch.float64, device=count.device)
    return (count.double() * keep - _ROUNDING).ceil()


def share(count: int, keep: float) -> int:
    """``ceil(keep n)``, robust to float rounding: 10 tokens of 100 at ``keep=0.1``, never 11."""
    return math.ceil(count * keep - _ROUNDING)


_ROUNDING = 1e-9


def check_numbers(name: str, numbers: tuple[int, ...], blocks: tuple[int, ...], least: int) -> None:
    """Raise :class:`UserError` unless there is one number of at least ``least`` per block."""
    words = "/".join(map(str, numbers))
    if len(numbers) != len(blocks):
        raise UserError(
            f"{name}={words} gives {len(numbers)} numbers for {len(blocks)} blocks: "
            "give one for all, or one for each"
        )
    if min(numbers) < least:
        raise UserError(f"{name}={words}: give whole numbers from {least}")
