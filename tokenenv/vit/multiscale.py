"""A second, coarser patch embedding, added to that of a pretrained model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, resample_patch_embed
from torch import Tensor, nn

from tokenenv.errors import UserError

STATE_PREFIX = "patch_embed.coarse."
"""Prefix of the names in a state dict whose model has two scales."""


class MultiScaleEmbed(nn.Module):
    """timm's patch embedding plus one with patches of twice the size (MSTM, arXiv 2306.04897).

    The paper fuses multi-scale features before tokens are pruned; how is not public. This module
    is ours: the embeddings of the coarse patches are upsampled bilinearly to the fine grid,
    normalised, and added through a linear gate that starts at zero, so a pretrained model's output
    does not change before it is trained. If the fine patches don't overlap, the coarse filters
    start as the fine ones, resampled.

    Attributes of the wrapped embedding can be read from this module.

    Args:
        fine: timm's patch embedding; it is used, not copied.

    Raises:
        UserError: it is no ``PatchEmbed``.

    Attributes:
        fine: as given.
        coarse: convolution ``(B, C, H, W)`` -> ``(B, D, ceil(h / 2), ceil(w / 2))`` for an
            ``(h, w)`` grid; images are padded to an even grid.
        norm_coarse: LayerNorm over ``D``.
        gate: linear layer ``D -> D``.
    """

    def __init__(self, fine: nn.Module) -> None:
        super().__init__()
        if not isinstance(fine, PatchEmbed):
            raise UserError(
                f"the model embeds patches with {type(fine).__name__}, not timm's PatchEmbed: "
                "train it with --set multi_scale=false"
            )
        self.fine = fine
        conv, patch = fine.proj, (2 * fine.patch_size[0], 2 * fine.patch_size[1])
        place: dict[str, Any] = {"device": conv.weight.device, "dtype": conv.weight.dtype}
        width = conv.out_channels
        self.coarse = nn.Conv2d(conv.in_channels, width, patch, stride=patch, **place)
        if conv.kernel_size == fine.patch_size:
            with torch.no_grad():
                self.coarse.weight.copy_(resample_patch_embed(conv.weight, list(patch)))
        self.norm_coarse = nn.LayerNorm(width, **place)
        self.gate = nn.Linear(width, width, **place)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def __getattr__(self, name: str) -> Any:
        """An attribute of the wrapped embedding, if this module does not have it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "fine":  # not set yet while this is being copied or unpickled
                raise
            return getattr(self.fine, name)

    def added(self) -> Iterator[nn.Parameter]:
        """The parameters that the pretrained model does not have."""
        for part in (self.coarse, self.norm_coarse, self.gate):
            yield from part.parameters()

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` -> patch embeddings in the layout of the wrapped embedding."""
        out: Tensor = self.fine(images)
        rows, columns = self.fine.dynamic_feat_size((images.shape[2], images.shape[3]))
        high, wide = self.coarse.stride
        images = F.pad(images, (0, -images.shape[3] % wide, 0, -images.shape[2] % high))
        seen = F.interpolate(self.coarse(images), scale_factor=2, mode="bilinear")
        seen = seen[:, :, :rows, :columns].flatten(2).transpose(1, 2)
        # The wrapped embedding may keep rows and columns as two dimensions, in the same order.
        return out + self.gate(self.norm_coarse(seen)).view(out.shape)


def add_scale(model: nn.Module) -> None:
    """Add a coarse patch embedding to a timm Vision Transformer, in place.

    The model's output does not change before it is trained.

    Raises:
        UserError: it has one already, or its patch embedding is not timm's ``PatchEmbed``.
    """
    holder: Any = model
    if isinstance(holder.patch_embed, MultiScaleEmbed):
        raise UserError("the model sees two scales already: take the one it was made of")
    holder.patch_embed = MultiScaleEmbed(holder.patch_embed)
