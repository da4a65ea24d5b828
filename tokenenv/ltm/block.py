"""LTM blocks, built from timm's modules: attention, merge, MLP; and stacks of such blocks.

``Z = X + Attn(LN X)``, ``X~ = G^T Z``, ``X~ + MLP(LN X~)`` (LTM, figure of the block; arXiv
2407.15219). Drop path and layer scale are the block's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from tokenenv.errors import check_choice
from tokenenv.ltm.mask import (
    AttentionMask,
    LinearMask,
    Mask,
    SimilarMask,
    check_half,
    merge,
    unmerge,
)
from tokenenv.ltm.schedule import Grid, even, shares

MaskKind = Literal["attention", "similar", "linear"]


class TransformerHalves:
    """The two halves of timm's transformer ``Block``, on ``(B, N, D)`` tokens."""

    @staticmethod
    def attend(block: Any, x: Tensor, grid: Grid) -> Tensor:
        """Attention and its residual."""
        return x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))

    @staticmethod
    def feed(block: Any, x: Tensor, grid: Grid) -> Tensor:
        """MLP and its residual."""
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


class Masks(nn.ModuleDict):
    """The masks of a stack, by block; :meth:`plan` makes them once the token grid is known.

    Args:
        ratio: share of the tokens left after the last block.
        depth: number of blocks.
        kind: one of :data:`MaskKind`.
        blocks: the blocks that merge, see :func:`~tokenenv.ltm.schedule.shares`.
        recursive, hard: as for :class:`~tokenenv.ltm.mask.Mask`.

    Raises:
        UserError: an unknown kind.
    """

    def __init__(
        self,
        ratio: float,
        depth: int,
        kind: MaskKind,
        recursive: bool,
        hard: bool,
        blocks: Sequence[int] | None,
    ) -> None:
        super().__init__()
        check_choice("mask", kind, MaskKind)
        self.shares = shares(ratio, depth, blocks)
        self.kind, self.recursive, self.hard = kind, recursive, hard

    def plan(self, grid: Grid, dim: int, target: Callable[[Grid, float], Grid]) -> None:
        """Make a mask for each block that reduces the number of tokens, starting with ``grid``."""
        before = grid
        for block, share in enumerate(self.shares):
            after = target(grid, share)
            self.add(block, before, dim, after)
            before = after

    def add(self, block: int, before: Grid, dim: int, after: Grid) -> None:
        """Make a block's mask from grid ``before`` to ``after``, unless the two are equal."""
        if after == before:
            return
        make: Any = AttentionMask
        if self.kind == "linear":
            make = partial(LinearMask, tokens=after[0] * after[1])
        elif self.kind == "similar":
            check_half(before[0] * before[1], after[0] * after[1])
            make = SimilarMask
        self[str(block)] = make(dim, recursive=self.recursive, hard=self.hard)

    def at(self, block: int) -> Mask | None:
        """The mask of a block, or None if it does not merge."""
        key = str(block)
        return cast(Mask, self[key]) if key in self.keys() else None


class Stack(nn.Module):
    """Transformer blocks that merge tokens one after the other.

    Args:
        blocks: timm's blocks.
        masks: the masks of the blocks.
        halves: runs the two halves of a block.
        target: maps a grid and a share to the grid of the merged tokens.
        prefix: number of tokens before the grid, such as the class token; they are never merged.
        unmerge: whether to restore the number of tokens after the stack. Each token then adds the
            change of the merged tokens that it is part of: ``z_n + sum_p G_np (y_p - x~_p)``, rows
            of G normalised. (Merging 14x14 tokens to 12x12 for the MLPs of pretrained DeiT-Tiny, on
            300 photographs: 76.3 % top-1 this way, 66.7 % with ``sum_p G_np y_p``, which loses each
            token's difference from the mean; 80.7 % dense.)
        parts: number of consecutive rows of the batch that belong to one image.

    Attributes:
        grid: rows and columns of the tokens that :meth:`forward` gets; set by its caller.
        record: a list to which each LTM block appends its ``(images, D)`` mean merged token, or
            None.
    """

    blocks: Any

    def __init__(
        self,
        blocks: Any,
        masks: Masks,
        halves: Any = TransformerHalves,
        target: Callable[[Grid, float], Grid] = even,
        prefix: int = 0,
        unmerge: bool = True,
        parts: int = 1,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.masks = masks
        self.halves, self.target = halves, target
        self.prefix, self.unmerge, self.parts = prefix, unmerge, parts
        self.grid: Grid = (0, 0)
        self.record: list[Tensor] | None = None

    def plan(self, dim: int) -> None:
        """Make the masks for the grid of the last forward pass."""
        self.masks.plan(self.grid, dim, self.target)

    @property
    def lengths(self) -> list[int]:
        """Tokens per image, without prefix, in each block's MLP in the last forward pass."""
        grid, found = self.grid, []
        for index in range(len(self.blocks)):
            if self.masks.at(index) is not None:
                grid = self.target(self.grid, self.masks.shares[index])
            found.append(grid[0] * grid[1] * self.parts)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``(B, prefix + N, D)`` -> the same, or ``(B, prefix + P, D)`` without unmerge.

        ``N`` is what :attr:`grid` says.
        """
        grid, previous, trail = self.grid, None, []
        for index, block in enumerate(self.blocks):
            x = self.halves.attend(block, x, grid)
            mask = self.masks.at(index)
            smaller = self.target(self.grid, self.masks.shares[index]) if mask else grid
            if mask is not None and smaller != grid:
                head, z = x[:, : self.prefix], x[:, self.prefix :]
                previous = mask(z, grid, smaller, previous)
                merged = merge(previous, z)
                if self.record is not None:
                    self.record.append(merged.unflatten(0, (-1, self.parts)).mean((1, 2)))
                trail.append((z, previous, merged))
                x, grid = torch.cat([head, merged], dim=1) if self.prefix else merged, smaller
            x = self.halves.feed(block, x, grid)
        if self.unmerge:
            for z, g, merged in reversed(trail):
                x = z + unmerge(g, x - merged)
        return x
