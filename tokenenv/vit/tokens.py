"""The tokens of a batch of images between two blocks of a Vision Transformer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokenenv.vit.layout import Packing


@dataclass(frozen=True)
class Tokens:
    """Tokens of ``B`` images between two blocks.

    The first ``prefix`` tokens (class, distillation, register tokens) are never removed; the
    others, the visual tokens, started as one token per image patch. A token is kept, or removed:
    pruned, or merged into another token.

    Attributes:
        x: ``(B, N, D)`` token embeddings; ``(R, D)`` if they are packed.
        size: ``(B, N)`` number of patches that a token stands for; 1 for a prefix token, 0 for a
            removed one.
        alive: ``(B, N)`` bool, True for kept tokens. Removed tokens may be at any position;
            attention never reads them.
        source: ``(B, P)`` index into ``N`` of the token that stands for each patch, -1 if pruned;
            None if nobody asked for it, which saves time.
        patches: number of patches ``P``.
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
    source: Tensor | None
    patches: int
    prefix: int
    keep_one: bool = False
    ragged: bool = False
    moved: bool = False
    merged: bool = False
    packing: Packing | None = None

    @staticmethod
    def start(x: Tensor, prefix: int, *, keep_one: bool = False, trace: bool = True) -> Tokens:
        """Tokens before block 0: one for each patch, none removed.

        Args:
            x: ``(B, prefix + P, D)`` embeddings.
            prefix: number of prefix tokens.
            keep_one: see :class:`Tokens`.
            trace: whether to keep :attr:`source`.
        """
        batch, count, _ = x.shape
        source = torch.arange(prefix, count, device=x.device).expand(batch, -1) if trace else None
        return Tokens(
            x=x,
            size=x.new_ones((), dtype=torch.float32).expand(batch, count),
            alive=torch.ones((), dtype=torch.bool, device=x.device).expand(batch, count),
            source=source,
            patches=count - prefix,
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
        """``(R, D)`` all embeddings as rows, a view of ``x``; R is ``B N`` if not packed."""
        return self.x.flatten(0, -2)

    def row(self, index: Tensor) -> Tensor:
        """Indices into :attr:`rows` of tokens.

        Args:
            index: ``(B, A)`` indices into ``N`` of kept tokens. For removed tokens the result is
                valid, but if tokens are packed it is another token's row.

        Returns:
            ``(B, A)`` int64.
        """
        if self.alive.shape[0] == 1:
            return index
        if self.packing is not None:
            return (index + self.packing.first[:, None]).clamp(max=len(self.x) - 1)
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
            source=None if self.source is None else self.source[rows],
        )

    def with_x(self, x: Tensor) -> Tokens:
        """The same tokens with other embeddings of the shape of ``x``."""
        return Tokens(  # replace() takes several times as long
            x,
            self.size,
            self.alive,
            self.source,
            self.patches,
            self.prefix,
            self.keep_one,
            self.ragged,
            self.moved,
            self.merged,
            self.packing,
        )

    def counts(self) -> Tensor:
        """``(B,)`` int64 number of kept tokens of each image, prefix included."""
        return self.alive.sum(1)

    @property
    def owners(self) -> Tensor:
        """:attr:`source`, which must have been kept."""
        assert self.source is not None, "the tokens were started without trace"
        return self.source

    def patch_alive(self) -> Tensor:
        """``(B, P)`` bool, whether a kept token stands for each patch."""
        return self.owners >= 0 if self.moved else self.visual_alive

    def to_patches(self, values: Tensor) -> Tensor:
        """Per-token values ``(B, N - prefix, ...)`` as per-patch values ``(B, P, ...)``.

        A token's value is repeated for all its patches; pruned patches get 0.
        """
        if not self.moved and not self.ragged:
            return values
        known = self.patch_alive().reshape(*self.owners.shape, *([1] * (values.dim() - 2)))
        if values.shape[1] == 0:
            return values.new_zeros(*self.owners.shape, *values.shape[2:])
        if self.moved:
            index = (self.owners - self.prefix).clamp(min=0).reshape(known.shape)
            values = values.gather(1, index.expand(-1, -1, *values.shape[2:]))
        return torch.where(known, values, values.new_zeros(()))

    def from_patches(self, values: Tensor) -> Tensor:
        """Per-patch values ``(B, P, ...)`` as per-token values ``(B, N - prefix, ...)``.

        Only for tokens that stand for one patch each (pruning); removed tokens may get 0.
        """
        if not self.moved:
            return values
        count = self.alive.shape[1] - self.prefix
        # Pruned patches write into one extra row that is cut off again.
        index = torch.where(self.owners >= 0, self.owners - self.prefix, count)
        index = index.reshape(*index.shape, *([1] * (values.dim() - 2))).expand_as(values)
        out = values.new_zeros(values.shape[0], count + 1, *values.shape[2:])
        return out.scatter(1, index, values)[:, :-1]
