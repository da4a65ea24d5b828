"""The state of a batch of images in the middle of a Vision Transformer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """How the living tokens of ``B`` images lie end to end, image after image, without a gap.

    Attributes:
        lengths: ``B`` numbers of living tokens, on the host; ``T`` is their sum.
        place: ``(T,)`` where each packed token lies in the padded layout, an index into ``B N``.
    """

    lengths: tuple[int, ...]
    place: Tensor

    @cached_property
    def ends(self) -> Tensor:
        """``(B + 1,)`` 0, then the packed index behind each image's last token."""
        ends = list(accumulate(self.lengths, initial=0))
        return torch.tensor(ends, device=self.place.device)

    @property
    def image(self) -> Tensor:
        """``(T,)`` whose token it is."""
        return self.place // max(self.lengths)

    def unpack(self, values: Tensor) -> Tensor:
        """``(T, ...)`` -> ``(B, N, ...)``, N the longest image's length; zeros for the dead."""
        batch, longest = len(self.lengths), max(self.lengths)
        padded = values.new_zeros(batch * longest, *values.shape[1:])
        return padded.index_copy_(0, self.place, values).unflatten(0, (batch, longest))


@dataclass(frozen=True)
class Tokens:
    """Tokens of ``B`` images between two blocks.

    The first ``prefix`` tokens (class, distillation, register tokens) are never removed; the
    others, the visual tokens, started as one token per image patch.

    Attributes:
        x: ``(B, N, D)`` token embeddings; ``(T, D)`` while they are packed.
        size: ``(B, N)`` how many patches a token stands for; 1 for a prefix token, 0 for a dead
            one.
        alive: ``(B, N)`` whether the token is still in the game. Dead tokens may lie anywhere;
            no attention reads them.
        source: ``(B, P)`` index into ``N`` of the token that stands for each patch, -1 once pruned.
        prefix: number of prefix tokens.
        keep_one: whether an image needs at least one visual token: without prefix tokens attention
            does, and so does a head that pools visual tokens.
        ragged: False while no token can be dead, so that no mask is needed. A plain bool: asking
            the tensors would make an accelerator wait.
        moved: False while visual token ``prefix + p`` is patch ``p`` for every image.
        merged: False while no token can stand for several patches.
        packing: how ``x`` is packed; None while it is not. All else keeps the padded layout, the
            living tokens of each image first.
    """

    x: Tensor
    size: Tensor
    alive: Tensor
    source: Tensor
    prefix: int
    keep_one: bool = False
    ragged: bool = False
    moved: bool = False
    merged: bool = False
    packing: Packing | None = None

    @staticmethod
    def start(x: Tensor, prefix: int, *, keep_one: bool = False) -> Tokens:
        """All patches alive, each its own token. ``x``: ``(B, prefix + P, D)``."""
        batch, count, _ = x.shape
        source = torch.arange(prefix, count, device=x.device).expand(batch, -1)
        return Tokens(
            x=x,
            size=x.new_ones((), dtype=torch.float32).expand(batch, count),
            alive=torch.ones((), dtype=torch.bool, device=x.device).expand(batch, count),
            source=source,
            prefix=prefix,
            keep_one=keep_one or prefix == 0,
        )

    @property
    def visual(self) -> Tensor:
        """``(B, N - prefix, D)`` embeddings of the visual tokens."""
        return self.x[:, self.prefix :]

    @property
    def visual_alive(self) -> Tensor:
        """``(B, N - prefix)`` which visual tokens are alive."""
        return self.alive[:, self.prefix :]

    @property
    def key_mask(self) -> Tensor | None:
        """``(B, 1, 1, N)`` bool mask of the keys attention may read; None when it may read all."""
        return self.alive[:, None, None, :] if self.ragged else None

    @property
    def rows(self) -> Tensor:
        """``(R, D)`` the embeddings below each other: a view of ``x``, padded or packed."""
        return self.x.flatten(0, -2)

    def row(self, index: Tensor) -> Tensor:
        """Which of :attr:`rows` holds each token. ``index``: ``(B, A)`` into ``N``, of living ones.

        Rows of dead tokens are there, but while tokens are packed they are another token's.
        """
        if self.packing is not None:
            first, last = self.packing.ends[:-1], len(self.x) - 1
            return (index + first[:, None]).clamp(max=last)
        batch, count = self.alive.shape
        return index + (torch.arange(batch, device=index.device) * count)[:, None]

    @property
    def size_bias(self) -> Tensor | None:
        """``(B, 1, 1, N)`` float32 log of the sizes, -inf for the dead.

        With it a key counts as its patches do. None while no token stands for several.
        """
        return self.size.log()[:, None, None, :] if self.merged else None

    def select(self, rows: Tensor) -> Tokens:
        """The tokens of some of the images. ``rows``: ``(b,)`` indices."""
        return replace(
            self,
            x=self.x[rows],
            size=self.size[rows],
            alive=self.alive[rows],
            source=self.source[rows],
        )

    def with_x(self, x: Tensor) -> Tokens:
        """The same tokens with other embeddings ``(B, N, D)``."""
        return replace(self, x=x)

    def counts(self) -> Tensor:
        """``(B,)`` int64 living tokens of each image, prefix included."""
        return self.alive.sum(1)

    def patch_alive(self) -> Tensor:
        """``(B, P)`` whether a living token stands for the patch."""
        return self.source >= 0 if self.moved else self.visual_alive

    def to_patches(self, values: Tensor) -> Tensor:
        """Spread per-token values ``(B, N - prefix, ...)`` over the patches: ``(B, P, ...)``.

        Pruned patches read 0.
        """
        if not self.moved and not self.ragged:
            return values
        known = self.patch_alive().reshape(*self.source.shape, *([1] * (values.dim() - 2)))
        if values.shape[1] == 0:
            return values.new_zeros(*self.source.shape, *values.shape[2:])
        if self.moved:
            index = (self.source - self.prefix).clamp(min=0).reshape(known.shape)
            values = values.gather(1, index.expand(-1, -1, *values.shape[2:]))
        return torch.where(known, values, values.new_zeros(()))

    def from_patches(self, values: Tensor) -> Tensor:
        """Per-patch values ``(B, P, ...)`` as per-token values ``(B, N - prefix, ...)``.

        For tokens that stand for one patch each (pruning); tokens without a patch read 0.
        """
        if not self.moved:
            return values
        count = self.x.shape[1] - self.prefix
        # Pruned patches write into one extra row that is cut off again.
        index = torch.where(self.source >= 0, self.source - self.prefix, count)
        index = index.reshape(*index.shape, *([1] * (values.dim() - 2))).expand_as(values)
        out = values.new_zeros(values.shape[0], count + 1, *values.shape[2:])
        return out.scatter(1, index, values)[:, :-1]
