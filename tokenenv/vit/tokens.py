"""The tokens of a batch of images between two blocks of a Vision Transformer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """How the kept tokens of ``B`` images are concatenated, image after image, without padding.

    Attributes:
        lengths: number of kept tokens of each of the ``B`` images, on the host; ``T`` is the sum.
        place: ``(T,)`` position of each packed token in the padded layout, an index into ``B N``.
    """

    lengths: tuple[int, ...]
    place: Tensor

    @cached_property
    def ends(self) -> Tensor:
        """``(B + 1,)`` cumulative lengths: 0, then the packed index after each image's tokens."""
        ends = list(accumulate(self.lengths, initial=0))
        return torch.tensor(ends, device=self.place.device)

    @property
    def image(self) -> Tensor:
        """``(T,)`` index of the image that each packed token belongs to."""
        return self.place // max(self.lengths)

    def unpack(self, values: Tensor) -> Tensor:
        """``(T, ...)`` -> ``(B, N, ...)``, padded by zeros to the longest image's length N."""
        batch, longest = len(self.lengths), max(self.lengths)
        padded = values.new_zeros(batch * longest, *values.shape[1:])
        return padded.index_copy_(0, self.place, values).unflatten(0, (batch, longest))


@dataclass(frozen=True)
class Tokens:
    """Tokens of ``B`` images between two blocks.

    The first ``prefix`` tokens (class, distillation, register tokens) are never removed; the
    others, the visual tokens, started as one token per image patch. A token is kept, or removed:
    pruned, or merged into another token.

    Attributes:
        x: ``(B, N, D)`` token embeddings; ``(T, D)`` if they are packed.
        size: ``(B, N)`` number of patches that a token stands for; 1 for a prefix token, 0 for a
            removed one.
        alive: ``(B, N)`` bool, True for kept tokens. Removed tokens may be at any position;
            attention never reads them.
        source: ``(B, P)`` index into ``N`` of the token that stands for each patch, -1 if pruned.
        prefix: number of prefix tokens.
        keep_one: whether an image needs at least one visual token: attention does if there are no
            prefix tokens, and so does a head that pools visual tokens.
        ragged: False if no token can have been removed, so that no mask is needed. A plain bool:
            reading it from the tensors would synchronise with an accelerator.
        moved: False if visual token ``prefix + p`` is patch ``p`` in every image.
        merged: False if no token can stand for several patches.
        packing: how ``x`` is packed; None if it is not. All other fields stay padded, with the
            kept tokens of each image first.
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
        """Tokens before block 0: one for each patch, none removed. ``x (B, prefix + P, D)``."""
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
        """``(B, N - prefix)`` bool, which visual tokens are kept."""
        return self.alive[:, self.prefix :]

    @property
    def key_mask(self) -> Tensor | None:
        """``(B, 1, 1, N)`` bool mask of the keys that attention reads; None if it reads all."""
        return self.alive[:, None, None, :] if self.ragged else None

    @property
    def rows(self) -> Tensor:
        """``(R, D)`` all embeddings as rows, a view of ``x``: R is ``B N``, or ``T`` if packed."""
        return self.x.flatten(0, -2)

    def row(self, index: Tensor) -> Tensor:
        """Indices into :attr:`rows` of tokens.

        Args:
            index: ``(B, A)`` indices into ``N`` of kept tokens. For removed tokens the result is
                valid, but if tokens are packed it is another token's row.

        Returns:
            ``(B, A)`` int64.
        """
        if self.packing is not None:
            first, last = self.packing.ends[:-1], len(self.x) - 1
            return (index + first[:, None]).clamp(max=last)
        batch, count = self.alive.shape
        return index + (torch.arange(batch, device=index.device) * count)[:, None]

    @property
    def size_bias(self) -> Tensor | None:
        """``(B, 1, 1, N)`` float32 log of the sizes, -inf for removed tokens.

        Added to the attention scores, it makes a key count once for each of its patches. None if
        no token stands for several patches.
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
        """``(B,)`` int64 number of kept tokens of each image, prefix included."""
        return self.alive.sum(1)

    def patch_alive(self) -> Tensor:
        """``(B, P)`` bool, whether a kept token stands for each patch."""
        return self.source >= 0 if self.moved else self.visual_alive

    def to_patches(self, values: Tensor) -> Tensor:
        """Per-token values ``(B, N - prefix, ...)`` as per-patch values ``(B, P, ...)``.

        A token's value is repeated for all its patches; pruned patches get 0.
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

        Only for tokens that stand for one patch each (pruning); removed tokens may get 0.
        """
        if not self.moved:
            return values
        count = self.x.shape[1] - self.prefix
        # Pruned patches write into one extra row that is cut off again.
        index = torch.where(self.source >= 0, self.source - self.prefix, count)
        index = index.reshape(*index.shape, *([1] * (values.dim() - 2))).expand_as(values)
        out = values.new_zeros(values.shape[0], count + 1, *values.shape[2:])
        return out.scatter(1, index, values)[:, :-1]
