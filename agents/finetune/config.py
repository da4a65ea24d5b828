"""The settings of fine-tuning runs, one class per method."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import nn

from agents.finetune.student import Student, Trainee
from agents.policies.dynamicvit import DynamicViTPolicy
from agents.policies.words import parse_policy
from agents.systems.settings import SystemConfig
from agents.workers import Workers
from tokenenv.errors import UserError
from tokenenv.game.checks import spread_blocks
from tokenenv.game.policy import Method
from tokenenv.game.rules import TokenPrune
from tokenenv.reducers import MSTM, EViT
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.multiscale import add_scale

if TYPE_CHECKING:
    from agents.training.finetuning import FineTuning
    from agents.training.request import Request

DIGITS: dict[str, Any] = {
    "updates": 300,
    "batch": 64,
    "lr": 2e-4,
    "crop": 0.7,
    "hflip": 0.0,
    "held_back": 0.15,
    "evaluate_every": 50,
}


@dataclass(frozen=True)
class FineTuneConfig(SystemConfig):
    """Settings of all fine-tuning runs (``--set key=value`` on the command line).

    The defaults are for an ImageNet model; :meth:`for_digits` has those for the embedded one.

    Attributes:
        updates: optimiser steps.
        batch: images per step, over all processes.
        accumulate: number of parts in which a process runs its images, to save memory.
        optimizer: timm's name of an optimiser.
        lr, min_lr: highest learning rate, and that at the end of the cosine schedule.
        added_rate: factor of the learning rate for parameters that the pretrained model lacks.
        warmup: share of the updates in which the learning rate rises.
        weight_decay: weight decay of matrices; vectors have none.
        clip: largest gradient norm.
        ema: decay of the moving average of the weights, which is saved; 0 saves the last weights.
        class_loss, logit_loss: weights of cross entropy, and of the divergence from the dense
            model's logits (DynamicViT's: 1, 0.5).
        smoothing: label smoothing.
        mixup, cutmix: alpha of timm's Mixup; 0: none.
        crop: smallest share of an image's area in a random resized crop.
        hflip: probability of a horizontal flip.
        auto_augment: timm's name of a policy, such as rand-m9-mstd0.5-inc1; empty: none.
        amp: mixed precision; ``auto``: bfloat16 on a GPU that has it, else float16, none on a CPU.
        held_back: share of the training images held back to select the best weights.
        held_most: largest number of these images.
        evaluate_every: updates between evaluations on these.

    Raises:
        UserError: a value is out of range.
    """

    updates: int = 2000
    batch: int = 128
    accumulate: int = 1
    optimizer: str = "adamw"
    lr: float = 2e-5
    min_lr: float = 1e-6
    added_rate: float = 20.0
    warmup: float = 0.05
    weight_decay: float = 0.05
    clip: float = 1.0
    ema: float = 0.999
    class_loss: float = 1.0
    logit_loss: float = 0.5
    smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    crop: float = 0.35
    hflip: float = 0.5
    auto_augment: str = ""
    amp: Literal["auto", "off", "bfloat16", "float16"] = "auto"
    held_back: float = 0.1
    held_most: int = 1000
    evaluate_every: int = 100

    any_family: ClassVar[bool] = False
    """Whether the method also takes models for which there is no :class:`Backbone`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch % self.accumulate:
            raise UserError(
                f"batch={self.batch} does not fall into accumulate={self.accumulate} equal parts: "
                "choose a divisor"
            )

    @classmethod
    def for_digits(cls) -> FineTuneConfig:
        """The default settings for the embedded model."""
        return cls(**DIGITS)

    def training(self, request: Request, workers: Workers, out: Path) -> FineTuning:
        """See :meth:`~agents.systems.settings.SystemConfig.training`."""
        from agents.training.finetuning import FineTuning

        return FineTuning(request, self, workers, out)

    def student(self, teacher: Any, model: str) -> Trainee:
        """The student: a copy of ``teacher``'s timm model, named ``model``, with the method.

        New parameters are initialised with torch's global generator.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class ReducingConfig(FineTuneConfig):
    """Settings of methods that reduce tokens between the stages of a ViT.

    Attributes:
        token_loss: weight of the squared error between the tokens left and the dense model's
            (DynamicViT's: 0.5).
    """

    token_loss: float = 0.5

    def student(self, teacher: Backbone, model: str) -> Student:
        """A copy of the backbone's model, with the method that reduces its tokens."""
        copied = copy.deepcopy(teacher.model).requires_grad_(True)
        self.prepare(copied)
        policy = self.method(teacher, model)
        policy.check_fit(teacher, model)
        return Student(copied, policy)

    def prepare(self, model: nn.Module) -> None:
        """Add the method's own parts to the pretrained model, in place."""

    def method(self, backbone: Backbone, model: str) -> Method:
        """The method for ``backbone``, whose timm name is ``model``."""
        raise NotImplementedError


@dataclass(frozen=True)
class MSTMConfig(ReducingConfig):
    """Settings of MSTM, see :class:`~tokenenv.reducers.MSTM`.

    Attributes:
        keep: share of the tokens that is crucial at each reduction.
        blocks: the blocks in which tokens are merged; empty: three, spread evenly.
        merge: whether the other tokens are merged; else they are pruned.
        multi_scale: whether the model also embeds patches of twice the size.
        weight, similarity: as for the reducer.
    """

    keep: float = 0.7
    blocks: tuple[int, ...] = ()
    merge: bool = True
    multi_scale: bool = True
    weight: Literal["importance", "mean", "size", "soft"] = "importance"
    similarity: Literal["keys", "tokens"] = "keys"

    def prepare(self, model: nn.Module) -> None:
        """Add the second scale, if asked for."""
        if self.multi_scale:
            add_scale(model)

    def method(self, backbone: Backbone, model: str) -> Method:
        """MSTM; without ``merge`` EViT without fusing, which prunes the other tokens."""
        blocks = self.blocks or spread_blocks(backbone.depth)
        if not self.merge:
            return EViT(blocks, self.keep, fuse=False)
        return MSTM(blocks, self.keep, self.weight, self.similarity)


@dataclass(frozen=True)
class EViTConfig(ReducingConfig):
    """Settings of EViT, see :class:`~tokenenv.reducers.EViT`.

    Attributes:
        keep: share of the tokens kept at each reduction.
        blocks: the blocks in which tokens are removed; empty: three, spread evenly.
        fuse: whether the others are fused into one token; else they are pruned.
    """

    keep: float = 0.7
    blocks: tuple[int, ...] = ()
    fuse: bool = True

    def method(self, backbone: Backbone, model: str) -> Method:
        """The EViT reducer."""
        return EViT(self.blocks or spread_blocks(backbone.depth), self.keep, self.fuse)


@dataclass(frozen=True)
class RL4EViTFineTuneConfig(ReducingConfig):
    """RL4EViT's second phase: the policy is fixed, and the backbone is fine-tuned under it.

    Attributes:
        policy: a run folder, a shipped policy, a method such as evit:keep=0.7, or module:Name of
            your own.
    """

    policy: str = "rl4evit-deit_tiny"

    @classmethod
    def for_digits(cls) -> RL4EViTFineTuneConfig:
        """The default settings for the embedded model, for which no policy is shipped."""
        return cls(**DIGITS, policy="")

    def method(self, backbone: Backbone, model: str) -> Method:
        """The policy that was trained before."""
        if not self.policy:
            raise UserError(
                "whose decisions shall the backbone learn with? Train a policy with "
                "'tokenenv train rl4evit', which takes a minute, and give --set policy=RUN"
            )
        return parse_policy(self.policy, backbone.depth)


@dataclass(frozen=True)
class DynamicViTConfig(ReducingConfig):
    """Settings of DynamicViT, see :class:`~agents.policies.dynamicvit.DynamicViTPolicy`.

    Attributes:
        keep: share of the tokens kept at each decision.
        blocks: the decision blocks; empty: three, spread evenly.
    """

    keep: float = 0.7
    blocks: tuple[int, ...] = ()

    def method(self, backbone: Backbone, model: str) -> DynamicViTPolicy:
        """Untrained predictors, initialised with torch's global generator."""
        if not backbone.has_class_token or backbone.family.pooling != "token":
            raise UserError(
                f"model '{model}' pools its patches and DynamicViT's training can't hide them "
                "there: take a model that classifies by its class token"
            )
        rules = TokenPrune(
            self.blocks or spread_blocks(backbone.depth), features=("token",), share=False
        )
        policy = DynamicViTPolicy(rules, backbone.dim, self.keep, trained_on=model)
        return policy.to(backbone.device)
