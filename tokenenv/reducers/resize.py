"""The baseline that needs no method: the same model on smaller images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenenv.errors import UserError
from tokenenv.reducers.base import Reducer
from tokenenv.vit.backbone import Backbone, Context
from tokenenv.vit.tokens import Tokens


@dataclass(frozen=True)
class Resize(Reducer):
    """The same model on smaller images: fewer tokens from the start, none removed later.

    Images of the model's own size are resized (bicubic, antialiased), and the position embeddings
    are resampled by timm. Resizing is not counted in multiply-adds.

    Attributes:
        blocks: always empty.
        size: side of the images, pixels; a multiple of the patch size.

    Raises:
        UserError: ``blocks`` are given, or the size is below 1.
    """

    blocks: tuple[int, ...] = ()
    size: int = 192
    required: ClassVar[tuple[str, ...]] = ("size",)
    traces = False
    usage: ClassVar[str] = "resize:size=192: the same model on smaller images"

    @classmethod
    def default_blocks(cls, depth: int) -> tuple[int, ...]:
        """No blocks: images are smaller from the start."""
        return ()

    def __post_init__(self) -> None:
        if self.blocks:
            raise UserError("resize takes no blocks: images are smaller from the start")
        if self.size < 1:
            raise UserError(f"size={self.size} must be a number of pixels above 0")

    def check(self, backbone: Backbone) -> None:
        """Raise :class:`UserError` if the size doesn't fit the backbone."""
        _, height, width = backbone.image_shape
        patch, across = backbone.family.patch_size
        if height != width or patch != across:
            raise UserError(f"resize takes square images and patches, not {height}x{width} images")
        if self.size % patch or self.size > height:
            raise UserError(
                f"size={self.size} must be a multiple of the patch size {patch}, {height} at most"
            )

    def reduce(self, tokens: Tokens, context: Context, step: int) -> Tokens:
        """The tokens as they are."""
        return tokens

    def resize(self, backbone: Backbone, images: Tensor) -> tuple[Backbone, Tensor]:
        """The model for smaller images, and the images ``(B, C, H, W)`` at their new size."""
        if images.shape[-1] == self.size:
            return backbone, images
        size = (self.size, self.size)
        small = F.interpolate(images.float(), size, mode="bicubic", antialias=True)
        return smaller(backbone, self.size), small.to(images.dtype)


_SMALLER: WeakKeyDictionary[Backbone, dict[int, Backbone]] = WeakKeyDictionary()


def smaller(backbone: Backbone, size: int) -> Backbone:
    """The same model for images of ``size`` x ``size`` pixels; cached per backbone.

    It shares all parameters but the position embeddings, which are resampled from the given
    model's, again if these have changed or need a gradient.
    """
    known = _SMALLER.setdefault(backbone, {})
    made = known.get(size)
    if made is None or made.family.parameter is not backbone.family.parameter:
        family = backbone.family
        made = known[size] = Backbone(
            family.resized(size), freeze=False, proven=True, family=type(family)
        )
    made.model.train(backbone.model.training)
    _place_positions(made, backbone)
    return made


def _place_positions(made: Backbone, backbone: Backbone) -> None:
    """Set the position embeddings of ``made`` to those of ``backbone``, resampled, if needed."""
    whole = backbone.family.positions
    if whole is None:
        return
    learning = torch.is_grad_enabled() and whole.requires_grad
    version = None if whole.is_inference() else whole._version
    state = (whole.data_ptr(), version, whole.dtype, learning)
    if not learning and getattr(made, "positions_of", None) == state:
        return
    # Not an inference tensor: the next pass may be a training step.
    with torch.inference_mode(False), torch.set_grad_enabled(learning):
        made.family.take_positions(backbone.family)
    made.__dict__["positions_of"] = state
