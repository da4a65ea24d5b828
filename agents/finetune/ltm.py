"""Training of Learnable Token Merging: its settings, and the model with its bound."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from agents.finetune.config import DIGITS, FineTuneConfig
from agents.finetune.student import Trainee
from tokenenv.data import ImageSource
from tokenenv.errors import UserError
from tokenenv.game.checks import spread_blocks
from tokenenv.ltm.block import MaskKind
from tokenenv.ltm.bound import Level, SeparableBound, label_weight
from tokenenv.ltm.model import LTM, ltm
from tokenenv.ltm.storage import CONFIG, WEIGHTS, write_ltm
from tokenenv.measure.evaluation import Evaluation, evaluate_model
from tokenenv.vit.dense import evaluating

_BATCH = 64  # images per batch when statistics are computed


class LTMOutput(NamedTuple):
    """The outputs of a model with LTM blocks for ``B`` images, with gradient.

    Attributes:
        logits: ``(B, classes)``.
        features: for each LTM block, its ``(B, D)`` mean merged token.
        keep: share of the tokens left in the last block of a stack, mean over the stacks.
    """

    logits: Tensor
    features: list[Tensor]
    keep: Tensor


class LTMStudent(Trainee):
    """A model with LTM blocks in training.

    Args:
        model: a model with LTM blocks; it is used, not copied.
    """

    files = (WEIGHTS, CONFIG)
    model: LTM

    def __init__(self, model: LTM) -> None:
        super().__init__()
        self.model = model
        self.bound = SeparableBound(model, model.num_classes)
        ends = [stack.lengths[-1] / stack.lengths[0] for stack in model.stacks]
        self._keep = sum(ends) / len(ends)

    @property
    def merges(self) -> bool:
        """Whether any block merges; False with a ratio of 1."""
        return any(len(stack.masks) for stack in self.model.stacks)

    def forward(self, images: Tensor) -> LTMOutput:
        """The outputs for normalised images ``(B, C, H, W)``."""
        with self.model.recording() as features:
            logits = self.model(images)
        return LTMOutput(logits, features, logits.new_tensor(self._keep))

    def before(self, done: int, clean: ImageSource, config: LTMConfig) -> None:
        """Compute the bound's statistics if they are due: when its term starts, then regularly."""
        weighs = self.merges and label_weight(done / config.updates, config.eta) > 0
        if weighs and (not self.bound.levels or done % config.evaluate_every == 0):
            self.bound.refresh(self._batches(clean))

    def terms(
        self, played: LTMOutput, dense: Tensor, labels: Tensor, config: LTMConfig
    ) -> dict[str, Tensor]:
        """The bound's label term, once its weight is above 0."""
        if not self.bound.levels:
            return {"bound_loss": played.logits.new_zeros(())}
        return {"bound_loss": config.eta * self.bound.loss(played.features, labels)}

    def remembered(self) -> dict[str, Any]:
        """The bound's statistics."""
        return {"levels": [[level.centroids, level.log_q] for level in self.bound.levels]}

    def remember(self, state: dict[str, Any]) -> None:
        """Restore the bound's statistics.

        Raises:
            RuntimeError, ValueError: they are of another model.
        """
        levels = [[tensor.to(self.device) for tensor in level] for level in state["levels"]]
        self.bound.levels = [Level(*level) for level in levels]
        if levels:
            size = (1, self.model.channels, *self.model.config["image_size"])
            image = torch.zeros(size, device=self.device, dtype=self.dtype)
            with torch.no_grad(), evaluating(self), self.model.recording() as features:
                self.model(image)
                self.bound.loss(features, torch.zeros(1, dtype=torch.long, device=self.device))

    def judged(self, clean: ImageSource, held_back: ImageSource) -> dict[str, float]:
        """The bound on held-back images, which are not in its statistics."""
        if not self.merges:
            return {}
        self.bound.refresh(self._batches(clean))
        report = self.bound.report(self._batches(held_back))
        return {"bound": report.bound, "ib": report.ib}

    def added(self) -> Iterator[nn.Parameter]:
        """The parameters of the masks."""
        for stack in self.model.stacks:
            yield from stack.masks.parameters()

    def measured(self, source: ImageSource, teacher: Any, **options: Any) -> Evaluation:
        """The result of :func:`tokenenv.measure.evaluation.evaluate_model` for the model now."""
        return evaluate_model(self.model, teacher, source, lengths=self.model.lengths, **options)

    def write(self, folder: Path, source: ImageSource) -> None:
        """Write the model for :func:`tokenenv.ltm.load_ltm`."""
        write_ltm(self.model, folder)

    def _batches(self, source: ImageSource) -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.arange(len(source)).split(_BATCH):
            batch = source.batch(index)
            if len(batch.index):
                yield batch.images.to(self.device, self.dtype), batch.labels


@dataclass(frozen=True)
class LTMConfig(FineTuneConfig):
    """Settings of LTM, see :func:`tokenenv.ltm.ltm`.

    Attributes:
        ratio: share of the tokens left after the last block of each transformer stack; 1 merges
            nothing, which fine-tunes the dense model in the same way. 0: the family's default.
        mask: ``attention``, ``similar`` or ``linear``; ``auto``: ``similar`` in a ViT, otherwise
            ``attention``.
        blocks: the blocks of each stack that merge; empty: three, spread evenly, with ``similar``
            masks in a ViT, otherwise all.
        hard: whether each token goes into one merged token only.
        eta: weight of the bound's label term after 30 % of the updates; 0: none. Its statistics,
            from four training images per class or 1000 in all, are computed every
            ``evaluate_every`` updates.
    """

    ratio: float = 0.0
    mask: Literal["auto", "attention", "similar", "linear"] = "auto"
    blocks: tuple[int, ...] = ()
    hard: bool = False
    eta: float = 0.1

    any_family: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eta and (self.mixup or self.cutmix):
            raise UserError(
                f"eta={self.eta}: the bound needs one label per image and mixup and cutmix mix "
                "them: leave those out, or give eta=0"
            )

    @classmethod
    def for_digits(cls) -> LTMConfig:
        """Settings for the embedded model."""
        return cls(**{**DIGITS, "updates": 100}, ratio=0.5)

    def student(self, teacher: Any, model: str) -> LTMStudent:
        """The teacher's model with LTM blocks; masks are initialised with torch's generator."""
        vit, blocks = isinstance(teacher.model, VisionTransformer), self.blocks or None
        own: MaskKind = "similar" if vit else "attention"
        mask = own if self.mask == "auto" else self.mask
        if vit and mask == "similar" and blocks is None:
            blocks = spread_blocks(len(teacher.model.blocks))
        made = ltm(teacher.model, self.ratio or None, mask, blocks=blocks, hard=self.hard)
        return LTMStudent(made.requires_grad_(True))
