"""Learnable Token Merging in training: its settings, and the model with its bound."""

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
from tokenenv.ltm.storage import write_ltm
from tokenenv.measure import evaluation as metrics

_BATCH = 64  # of the passes that take statistics


class Merged(NamedTuple):
    """What ``B`` images came to, with gradient.

    Attributes:
        logits: ``(B, classes)``.
        features: ``(B, D)`` the mean merged token of each LTM block.
        keep: share of the tokens that the last blocks of the stacks work on, a mean.
    """

    logits: Tensor
    features: list[Tensor]
    keep: Tensor


class LTMStudent(Trainee):
    """A model with LTM blocks in training.

    Args:
        model: it is used, not copied.
    """

    files = ("model.safetensors", "ltm.json")
    model: LTM

    def __init__(self, model: LTM) -> None:
        super().__init__()
        self.model = model
        self.bound = SeparableBound(model, model.num_classes)
        ends = [stack.lengths[-1] / stack.lengths[0] for stack in model.stacks]
        self._keep = sum(ends) / len(ends)

    @property
    def merges(self) -> bool:
        """Whether any block merges; with a ratio of 1 none does."""
        return any(len(stack.masks) for stack in self.model.stacks)

    def forward(self, images: Tensor) -> Merged:
        """Images ``(B, C, H, W)``, normalised -> how they fared."""
        with self.model.recording() as features:
            logits = self.model(images)
        return Merged(logits, features, logits.new_tensor(self._keep))

    def before(self, done: int, clean: ImageSource, config: LTMConfig) -> None:
        """Take the bound's statistics anew where they count: at first, then once per epoch."""
        weighs = self.merges and label_weight(done / config.updates, config.eta) > 0
        if weighs and (not self.bound.levels or done % config.evaluate_every == 0):
            self.bound.refresh(self._batches(clean))

    def terms(
        self, played: Merged, dense: Tensor, labels: Tensor, config: LTMConfig
    ) -> dict[str, Tensor]:
        """The bound's label term, once it counts."""
        if not self.bound.levels:
            return {"bound_loss": played.logits.new_zeros(())}
        return {"bound_loss": config.eta * self.bound.loss(played.features, labels)}

    def remembered(self) -> dict[str, Any]:
        """The bound's statistics."""
        return {"levels": [[level.centroids, level.log_q] for level in self.bound.levels]}

    def remember(self, state: dict[str, Any]) -> None:
        """Go on with these statistics."""
        levels = [[tensor.to(self.device) for tensor in level] for level in state["levels"]]
        self.bound.levels = [Level(*level) for level in levels]

    def judged(self, clean: ImageSource, held_back: ImageSource) -> dict[str, float]:
        """The bound of images that its statistics have not seen."""
        if not self.merges:
            return {}
        self.bound.refresh(self._batches(clean))
        report = self.bound.report(self._batches(held_back))
        return {"bound": report.bound, "ib": report.ib}

    def added(self) -> Iterator[nn.Parameter]:
        """The masks'."""
        for stack in self.model.stacks:
            yield from stack.masks.parameters()

    def measured(self, source: ImageSource, teacher: Any, **options: Any) -> metrics.Evaluation:
        """:func:`tokenenv.measure.evaluation.evaluate_model` of the model as it is."""
        return metrics.evaluate_model(
            self.model, teacher, source, lengths=self.model.lengths, **options
        )

    def write(self, folder: Path, source: ImageSource) -> None:
        """The model, as :func:`tokenenv.ltm.load_ltm` reads it."""
        write_ltm(self.model, folder)

    def _batches(self, source: ImageSource) -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.arange(len(source)).split(_BATCH):
            batch = source.batch(index)
            if len(batch.index):
                yield batch.images.to(self.device, self.dtype), batch.labels


@dataclass(frozen=True)
class LTMConfig(FineTuneConfig):
    """What is LTM's own, see :func:`tokenenv.ltm.ltm`.

    Attributes:
        ratio: share of the tokens left after the last block of each transformer stack; 1 merges
            nothing, which trains the dense model alike. 0: the default of the model's family.
        mask: ``attention``, ``similar`` or ``linear``; ``auto``: ``similar`` in a ViT, elsewhere
            ``attention``.
        blocks: those of each stack in which tokens merge; empty: three, spread evenly, under
            ``similar`` masks in a ViT, else all.
        hard: whether each token goes into one merged token only.
        eta: weight of the bound's label term, once 30 % of the updates are done; 0 for none. Its
            statistics, of four training images per class or 1000 in all, are taken anew every
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
        """The teacher's model with LTM blocks; masks are initialised from torch's generator."""
        vit, blocks = isinstance(teacher.model, VisionTransformer), self.blocks or None
        own: MaskKind = "similar" if vit else "attention"
        mask = own if self.mask == "auto" else self.mask
        if vit and mask == "similar" and blocks is None:
            blocks = spread_blocks(len(teacher.model.blocks))
        made = ltm(teacher.model, self.ratio or None, mask, blocks=blocks, hard=self.hard)
        return LTMStudent(made.requires_grad_(True))
