"""How LTM blocks are built into each timm family: its transformer stacks and what is merged.

- ViT: the stack is all blocks; merged over the whole image; never un-merged, the head reads the
  merged tokens.
- Swin: each stage; merged inside each (unshifted) window, for the MLP only; un-merged after each
  MLP.
- MobileViT: each block's transformer; merged over the image, per pixel of a patch; un-merged after
  the stack.
- EfficientViT: a stage's blocks; merged over the image, MBConv sees the merged grid; un-merged
  after the stack.

Swin's windows, shifts and relative positions belong to the full grid, so attention runs on it, and
tokens are merged for the MLP only. A smaller grid for a whole stage would need other windows and
other position biases.

If a ViT's head reads the class token, merging in its last block does not change the logits; it
saves part of an MLP and matters for the bound only. An averaging head counts each merged token
once.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tokenenv.errors import UserError
from tokenenv.ltm.block import Masks, Stack
from tokenenv.ltm.mask import merge, unmerge
from tokenenv.ltm.schedule import Grid, check_window, even, flat

Stacks = list[tuple[Any, int]]
"""The stacks of a model and the width of their tokens."""


class ConvHalves:
    """The halves of EfficientViT's block, which work on ``(B, D, H, W)`` maps."""

    @staticmethod
    def attend(block: Any, x: Tensor, grid: Grid) -> Tensor:
        """Multi-scale linear attention and its residual."""
        return _tokens(block.context_module(_map(x, grid)))

    @staticmethod
    def feed(block: Any, x: Tensor, grid: Grid) -> Tensor:
        """MBConv, which is this family's MLP, and its residual."""
        return _tokens(block.local_module(_map(x, grid)))


class MapStack(Stack):
    """A stack between convolutions, from and to ``(B, D, H, W)`` maps."""

    def forward(self, x: Tensor) -> Tensor:
        """The map after the blocks, of the same shape."""
        self.grid = (x.shape[2], x.shape[3])
        return _map(super().forward(_tokens(x)), self.grid)


class PatchGrid(nn.Module):
    """A MobileViT block that passes the grid of patches to its transformer.

    Args:
        block: timm's block, whose ``transformer`` is a :class:`Stack`.
    """

    block: Any

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, C, H, W)`` -> the same shape; timm resizes them to whole patches inside."""
        high, wide = self.block.patch_size
        self.block.transformer.grid = (-(-x.shape[2] // high), -(-x.shape[3] // wide))
        return self.block(x)


class WindowStack(nn.Module):
    """The blocks of a Swin stage; tokens are merged inside windows for the MLP only.

    Args:
        blocks: timm's blocks.
        masks: the masks of the blocks.

    Attributes:
        record: as for :class:`~tokenenv.ltm.block.Stack`.
    """

    blocks: Any

    def __init__(self, blocks: Any, masks: Masks) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.masks = masks
        self.record: list[Tensor] | None = None

    def plan(self, dim: int) -> None:
        """Make the masks.

        Unlike in a :class:`Stack`, every block starts from whole windows, so every block with a
        share below 1 has a mask.
        """
        for index, (block, share) in enumerate(zip(self.blocks, self.masks.shares, strict=True)):
            self.masks.add(index, block.window_size, dim, even(block.window_size, share))

    @property
    def lengths(self) -> list[int]:
        """Tokens per image in each block's MLP."""
        found = []
        for block, share in zip(self.blocks, self.masks.shares, strict=True):
            (rows, columns), (high, wide) = block.input_resolution, block.window_size
            left = even(block.window_size, share)
            found.append(rows // high * (columns // wide) * left[0] * left[1])
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``(B, H, W, D)`` -> the same shape.

        Raises:
            UserError: the windows do not divide the grid.
        """
        previous = None
        for index, block in enumerate(self.blocks):
            z = x + block.drop_path1(block._attn(block.norm1(x)))
            mask = self.masks.at(index)
            if mask is None:
                x = z + block.drop_path2(block.mlp(block.norm2(z)))
                continue
            window = block.window_size
            smaller = even(window, self.masks.shares[index])
            parts = _windows(z, window)
            previous = mask(parts, window, smaller, previous)
            merged = merge(previous, parts)
            # All windows of an image in one row: drop path drops images, not windows.
            whole = merged.reshape(len(x), -1, merged.shape[2])
            if self.record is not None:
                self.record.append(whole.mean(1))
            change = block.drop_path2(block.mlp(block.norm2(whole))).reshape(merged.shape)
            x = z + _from_windows(unmerge(previous, change), window, x.shape)
        return x


def vit(model: Any, ratio: float, options: dict[str, Any]) -> Stacks:
    """Build LTM blocks into a ``VisionTransformer``, in place.

    Raises:
        UserError: blocks or options whose tokens can't be merged.
    """
    from timm.models.vision_transformer import Block

    for index, block in enumerate(model.blocks):
        if type(block) is not Block:
            raise UserError(
                f"LTM can't merge inside block {index}, a {type(block).__name__}: use a model "
                "whose blocks are timm's plain Block (ViT, DeiT, CLIP, DINOv2 ...)"
            )
    if getattr(model.patch_drop, "prob", 0):
        raise UserError(
            "LTM needs the whole grid of patches and this model drops some of them in training: "
            "create it with patch_drop_rate=0"
        )
    masks = Masks(ratio, len(model.blocks), **options)
    target = even if masks.kind == "attention" else flat
    model.blocks = Stack(
        model.blocks, masks, target=target, prefix=model.num_prefix_tokens, unmerge=False
    )
    return [(model.blocks, model.embed_dim)]


def swin(model: Any, ratio: float, options: dict[str, Any]) -> Stacks:
    """Build LTM blocks into a ``SwinTransformer``, in place.

    Raises:
        UserError: the ratio or the windows don't divide evenly.
    """
    stacks: Stacks = []
    for stage in model.layers:
        for block in stage.blocks:
            _check_windows(block.input_resolution, block.window_size)
            check_window(block.window_size, ratio)
        masks = Masks(ratio, len(stage.blocks), **options)
        stage.blocks = WindowStack(stage.blocks, masks)
        stacks.append((stage.blocks, stage.blocks.blocks[0].dim))
    return stacks


def mobilevit(model: Any, ratio: float, options: dict[str, Any]) -> Stacks:
    """Build LTM blocks into a MobileViT (version 1: one attention per patch pixel), in place."""
    from timm.models.mobilevit import MobileVitBlock

    stacks: Stacks = []
    for stage in model.stages:
        for name, block in list(stage.named_children()):
            if not isinstance(block, MobileVitBlock):
                continue
            made = PatchGrid(block)
            masks = Masks(ratio, len(block.transformer), **options)
            target = flat if masks.kind == "similar" else even
            made.block.transformer = Stack(
                block.transformer, masks, target=target, parts=block.patch_area
            )
            setattr(stage, name, made)
            stacks.append((made.block.transformer, made.block.norm.normalized_shape[0]))
    return stacks


def efficientvit(model: Any, ratio: float, options: dict[str, Any]) -> Stacks:
    """Build LTM blocks into an EfficientViT (MIT's, B and L), in place.

    Raises:
        UserError: masks whose merged tokens lie on no grid.
    """
    from timm.models.efficientvit_mit import EfficientVitBlock

    if options["kind"] == "similar":
        raise UserError(
            "mask='similar' leaves no grid, which EfficientViT's convolutions need: "
            "take mask='attention'"
        )
    stacks: Stacks = []
    for stage in model.stages:
        blocks: list[Any] = [b for b in stage.blocks if isinstance(b, EfficientVitBlock)]
        if not blocks:
            continue
        others = [block for block in stage.blocks if not isinstance(block, EfficientVitBlock)]
        masks = Masks(ratio, len(blocks), **options)
        stack = MapStack(blocks, masks, halves=ConvHalves)
        stage.blocks = nn.Sequential(*others, stack)
        stacks.append((stack, blocks[0].context_module.main.proj.conv.out_channels))
    return stacks


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def _map(x: Tensor, grid: Grid) -> Tensor:
    return x.transpose(1, 2).unflatten(2, grid).contiguous()


def _check_windows(grid: Grid, window: Grid) -> None:
    if grid[0] % window[0] or grid[1] % window[1]:
        raise UserError(
            f"the {window[0]}x{window[1]} windows don't divide the {grid[0]}x{grid[1]} tokens of a "
            "stage: choose an image size they divide at every stage (224 for windows of 7)"
        )


def _windows(x: Tensor, window: Grid) -> Tensor:
    """``(B, H, W, D)`` -> ``(B * windows, rows * columns, D)``."""
    from timm.models.swin_transformer import window_partition

    _check_windows((x.shape[1], x.shape[2]), window)
    return window_partition(x, window).flatten(1, 2)


def _from_windows(parts: Tensor, window: Grid, shape: tuple[int, ...]) -> Tensor:
    from timm.models.swin_transformer import window_reverse

    return window_reverse(parts.unflatten(1, window), window, shape[1], shape[2])
