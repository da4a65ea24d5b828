"""A timm model that merges tokens inside its transformer stacks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from tokenenv.errors import UserError, check_choice
from tokenenv.game.cost import measured_macs
from tokenenv.ltm import families
from tokenenv.ltm.block import MaskKind, Stack
from tokenenv.ltm.families import WindowStack
from tokenenv.ltm.schedule import check_ratio
from tokenenv.vit.dense import evaluating

Feature = Literal["blocks", "pooled"]

RATIOS = {"ViT": 0.63, "Swin": 25 / 49, "MobileViT": 0.15, "EfficientViT": 0.5}
"""Share of the tokens left at the end of a stack by default, per family."""


def ltm(
    model: nn.Module,
    ratio: float | None = None,
    mask: MaskKind = "attention",
    *,
    blocks: Sequence[int] | None = None,
    recursive: bool = False,
    hard: bool = False,
    image_size: int | tuple[int, int] | None = None,
) -> LTM:
    """A copy of a timm model with LTM blocks.

    Args:
        model: a ViT, Swin, MobileViT or (MIT's) EfficientViT of timm's, pretrained or not; it is
            not changed.
        ratio: share of the tokens left after the last block of each transformer stack; 1 merges
            nothing and gives timm's logits. None: the family's default in :data:`RATIOS`. Swin's
            windows allow ``(k / 7) ** 2`` only.
        mask: ``attention`` works at any resolution, ``linear`` at one. ``similar`` is attention
            with centres chosen in each image; not in EfficientViT, whose convolutions need a grid.
        blocks: the blocks of each stack that merge, counted from 0; None: all. In Swin, where
            tokens are un-merged after each block, all blocks from the first of these merge.
        recursive: whether a mask depends on that of the block before, if both have the same shape
            (in Swin's stages).
        hard: whether each token goes into one merged token only.
        image_size: side or (height, width), pixels, for MobileViT and EfficientViT, which do not
            store theirs; masks depend on it. None: that of the pretrained weights.

    Raises:
        UserError: another model, a ratio out of range or one that Swin's windows don't divide.
    """
    return LTM(
        model, ratio, mask, blocks=blocks, recursive=recursive, hard=hard, image_size=image_size
    )


class LTM(nn.Module):
    """A timm model with LTM blocks, with the inputs and outputs of the timm model.

    Its parameters, those of the timm model and of the masks, are all below ``model``.

    Args:
        model, ratio, mask, blocks, recursive, hard, image_size: as for :func:`ltm`.

    Attributes:
        model: the copy of the timm model.
        family: ``ViT``, ``Swin``, ``MobileViT`` or ``EfficientViT``.
        config: the arguments, as JSON values.
        num_classes, pretrained_cfg: as in the timm model.
    """

    model: Any

    def __init__(
        self,
        model: nn.Module,
        ratio: float | None,
        mask: MaskKind,
        *,
        blocks: Sequence[int] | None,
        recursive: bool,
        hard: bool,
        image_size: int | tuple[int, int] | None,
    ) -> None:
        super().__init__()
        self.family, cut = _family(model)
        ratio = check_ratio(RATIOS[self.family] if ratio is None else ratio)
        self.model = copy.deepcopy(model)
        size = _image_size(self.model, image_size)
        options = {"kind": mask, "recursive": recursive, "hard": hard, "blocks": blocks}
        stacks = cut(self.model, ratio, options)
        self.config: dict[str, Any] = {
            "ratio": ratio,
            "mask": mask,
            "blocks": None if blocks is None else list(blocks),
            "recursive": recursive,
            "hard": hard,
            "image_size": list(size),
        }
        self.num_classes = self.model.num_classes
        self.pretrained_cfg = getattr(self.model, "pretrained_cfg", {})
        _check_blocks(blocks, max(len(stack.blocks) for stack, _ in stacks))
        self._plan(stacks, size)

    @torch.no_grad()
    def _plan(self, stacks: families.Stacks, size: tuple[int, int]) -> None:
        """Make the masks for this image size; a forward pass shows the grids."""
        weight = next(self.model.parameters())
        image = torch.zeros(1, self.channels, *size, device=weight.device, dtype=weight.dtype)
        with evaluating(self):
            self(image)
        for stack, dim in stacks:
            stack.plan(dim)
        self.to(weight.device, weight.dtype)

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return next(m for m in self.model.modules() if isinstance(m, nn.Conv2d)).in_channels

    @property
    def stacks(self) -> list[Stack | WindowStack]:
        """The transformer stacks, in the order in which they run."""
        return [m for m in self.modules() if isinstance(m, Stack | WindowStack)]

    @property
    def lengths(self) -> list[int]:
        """Tokens per image in each block's MLP, at the size of the last images."""
        return [count for stack in self.stacks for count in stack.lengths]

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, by timm's convention."""
        named: set[str] = getattr(self.model, "no_weight_decay", set)()
        return {f"model.{name}" for name in named}

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, C, H, W)``, normalised -> logits ``(B, classes)``."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """The output of timm's ``forward_features`` for images; of a ViT the merged tokens."""
        if self.family == "ViT":
            patches = self.model.patch_embed
            dynamic = getattr(self.model, "dynamic_img_size", False)
            size = (x.shape[2], x.shape[3])
            grid = patches.dynamic_feat_size(size) if dynamic else patches.grid_size
            # Masks that need no grid treat the tokens as a sequence of any length.
            even = self.config["mask"] == "attention"
            self.model.blocks.grid = tuple(grid) if even else (1, grid[0] * grid[1])
        return self.model.forward_features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits from the output of :meth:`forward_features`, or the classifier's input."""
        return self.model.forward_head(x, pre_logits=pre_logits)

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.model.get_classifier()

    @contextmanager
    def recording(self, feature: Feature = "blocks") -> Iterator[list[Tensor]]:
        """A context in which forward passes collect the features that the bound reads.

        Args:
            feature: ``blocks``: the mean of the merged tokens of each LTM block, as in the paper;
                ``pooled``: the classifier's input, as in its published code.

        Returns:
            A list to which every forward pass appends its ``(B, D)`` features, with gradient.
            Clear it between two passes.

        Raises:
            UserError: an unknown feature.
        """
        check_choice("feature", feature, Feature)
        found: list[Tensor] = []
        if feature == "pooled":
            hook = self.get_classifier().register_forward_pre_hook(
                lambda module, inputs: found.append(inputs[0])
            )
            try:
                yield found
            finally:
                hook.remove()
        else:
            for stack in self.stacks:
                stack.record = found
            try:
                yield found
            finally:
                for stack in self.stacks:
                    stack.record = None


def measure(model: nn.Module, images: Tensor) -> float:
    """Multiply-adds of one image in ``model``, masks, merging and un-merging included.

    Counts matrix products, those of attention included, and convolutions; 1 MAC = 1 FLOP. All
    images cost the same, as the schedule is fixed.

    Args:
        model: any module.
        images: ``(B, C, H, W)``, normalised.
    """
    with evaluating(model):
        return measured_macs(lambda: model(images)) / len(images)


def check_family(model: nn.Module) -> None:
    """Raise :class:`UserError` unless a model is of a family that LTM has blocks for."""
    _family(model)


def _family(model: nn.Module) -> tuple[str, Callable[..., families.Stacks]]:
    from timm.models.byobnet import ByobNet
    from timm.models.efficientvit_mit import EfficientVit, EfficientVitLarge
    from timm.models.mobilevit import MobileVitBlock
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.vision_transformer import VisionTransformer

    if isinstance(model, LTM):
        raise UserError("the model has LTM blocks already: give the timm model it was made of")
    if isinstance(model, VisionTransformer):
        return "ViT", families.vit
    if isinstance(model, SwinTransformer):
        return "Swin", families.swin
    if isinstance(model, EfficientVit | EfficientVitLarge):
        return "EfficientViT", families.efficientvit
    if isinstance(model, ByobNet) and any(isinstance(m, MobileVitBlock) for m in model.modules()):
        return "MobileViT", families.mobilevit
    raise UserError(
        f"LTM has no blocks for a {type(model).__name__}: use a timm VisionTransformer, "
        "SwinTransformer, MobileViT (version 1) or MIT's EfficientViT (efficientvit_b*, _l*)"
    )


def _check_blocks(blocks: Sequence[int] | None, depth: int) -> None:
    bad = [block for block in blocks or () if not 0 <= block < depth]
    if bad:
        raise UserError(
            f"blocks: {bad[0]} is out of range, the longest stack has blocks 0 to {depth - 1}"
        )


def _image_size(model: Any, given: int | tuple[int, int] | None) -> tuple[int, int]:
    own = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if own is not None:
        if given is not None and to_2tuple(given) != tuple(own):
            raise UserError(
                f"image_size={given}, and the model is made for {own[0]}x{own[1]}: create it with "
                "img_size=... and leave image_size out"
            )
        return tuple(own)
    size = to_2tuple(model.pretrained_cfg["input_size"][1:] if given is None else given)
    if min(size) < 32:
        raise UserError(f"image_size={given}: give 32 pixels or more")
    return size
