"""The settings of a fine-tuning run, and what is built from them."""

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
    """What every fine-tuning run can set with ``--set key=value``.

    The defaults are for an ImageNet model; :meth:`for_digits` for the embedded one.

    Attributes:
        updates: steps of the optimiser.
        batch: images per step, of all processes together.
        accumulate: parts in which a process goes through its images, where memory is short.
        optimizer: the name of one of timm's.
        lr, min_lr: highest learning rate, and the one that its cosine ends at.
        added_rate: how many times as fast learns what the pretrained model does not have.
        warmup: share of the updates in which the rate rises.
        weight_decay: of all but vectors.
        clip: highest norm of the gradient.
        ema: decay of the moving average of the weights, which is what is kept; 0 keeps the last.
        class_loss, logit_loss: weights of cross entropy, and of the divergence from the dense
            model's logits (DynamicViT's: 1, 0.5).
        smoothing: of the labels.
        mixup, cutmix: alpha of timm's Mixup; 0 for none.
        crop: the least share of an image's area that training sees.
        hflip: probability of a mirror image.
        auto_augment: timm's words, such as rand-m9-mstd0.5-inc1; empty for none.
        amp: mixed precision; ``auto``: bfloat16 on a GPU that has it, else float16, none on a CPU.
        held_back: share of the training images on which weights are compared, not trained.
        evaluate_every: updates between two such comparisons.

    Raises:
        UserError: a value out of its range.
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
    evaluate_every: int = 100

    any_family: ClassVar[bool] = False
    """Whether the method needs no :class:`Backbone`: it works on families that have none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch % self.accumulate:
            raise UserError(
                f"batch={self.batch} does not fall into accumulate={self.accumulate} equal parts: "
                "choose a divisor"
            )

    @classmethod
    def for_digits(cls) -> FineTuneConfig:
        """Settings for the embedded model."""
        return cls(**DIGITS)

    def training(self, request: Request, workers: Workers, out: Path) -> FineTuning:
        """See :meth:`~agents.systems.settings.SystemConfig.training`."""
        from agents.training.finetuning import FineTuning

        return FineTuning(request, self, workers, out)

    def student(self, teacher: Any, model: str) -> Trainee:
        """What is trained: a copy of ``teacher``'s timm model, named ``model``, with the method.

        Initialised from torch's global generator.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class ReducingConfig(FineTuneConfig):
    """Settings of methods in which a policy decides between the blocks of a ViT.

    Attributes:
        token_loss: weight of the squared error of the tokens left against the dense model's
            (DynamicViT's: 0.5).
    """

    token_loss: float = 0.5

    def student(self, teacher: Backbone, model: str) -> Student:
        """A copy of the backbone's model, and what decides in it."""
        copied = copy.deepcopy(teacher.model).requires_grad_(True)
        self.prepare(copied)
        policy = self.method(teacher, model)
        policy.check_fit(teacher, model)
        return Student(copied, policy)

    def prepare(self, model: nn.Module) -> None:
        """Give the pretrained model what the method adds, in place."""

    def method(self, backbone: Backbone, model: str) -> Method:
        """What decides in ``backbone``, named ``model``."""
        raise NotImplementedError


@dataclass(frozen=True)
class MSTMConfig(ReducingConfig):
    """What is MSTM's own, see :class:`~tokenenv.reducers.MSTM`.

    Attributes:
        keep: share of the tokens that is crucial at each reduction.
        blocks: where tokens merge; empty: three, spread evenly.
        merge: whether the others merge; without it they leave.
        multi_scale: whether the model also sees patches of twice the size.
        weight, similarity: how tokens merge.
    """

    keep: float = 0.7
    blocks: tuple[int, ...] = ()
    merge: bool = True
    multi_scale: bool = True
    weight: Literal["importance", "mean", "size", "soft"] = "importance"
    similarity: Literal["keys", "tokens"] = "keys"

    def prepare(self, model: nn.Module) -> None:
        """The second scale."""
        if self.multi_scale:
            add_scale(model)

    def method(self, backbone: Backbone, model: str) -> Method:
        """MSTM's mergence; without ``merge`` EViT, which then drops the others."""
        blocks = self.blocks or spread_blocks(backbone.depth)
        if not self.merge:
            return EViT(blocks, self.keep, fuse=False)
        return MSTM(blocks, self.keep, self.weight, self.similarity)


@dataclass(frozen=True)
class EViTConfig(ReducingConfig):
    """What is EViT's own, see :class:`~tokenenv.reducers.EViT`.

    Attributes:
        keep: share of the tokens that stays at each reduction.
        blocks: where tokens leave; empty: three, spread evenly.
        fuse: whether the others fuse into one token.
    """

    keep: float = 0.7
    blocks: tuple[int, ...] = ()
    fuse: bool = True

    def method(self, backbone: Backbone, model: str) -> Method:
        """EViT."""
        return EViT(self.blocks or spread_blocks(backbone.depth), self.keep, self.fuse)


@dataclass(frozen=True)
class RL4EViTFineTuneConfig(ReducingConfig):
    """RL4EViT's second phase: the policy is fixed and the backbone learns to live with it.

    Attributes:
        policy: a run folder, a shipped policy, or any WHAT that ``evaluate`` takes.
    """

    policy: str = "rl4evit-deit_tiny"

    @classmethod
    def for_digits(cls) -> RL4EViTFineTuneConfig:
        """Settings for the embedded model: no policy for it is shipped."""
        return cls(**DIGITS, policy="")

    def method(self, backbone: Backbone, model: str) -> Method:
        """The trained one."""
        if not self.policy:
            raise UserError(
                "whose decisions shall the backbone learn with? Train a policy with "
                "'tokenenv train rl4evit', which takes a minute, and give --set policy=RUN"
            )
        return parse_policy(self.policy, backbone.depth)


@dataclass(frozen=True)
class DynamicViTConfig(ReducingConfig):
    """What is DynamicViT's own, see :class:`~agents.policies.dynamicvit.DynamicViTPolicy`.

    Attributes:
        keep: share of the tokens that stays at each pruning.
        blocks: where tokens leave; empty: three, spread evenly.
    """

    keep: float = 0.7
    blocks: tuple[int, ...] = ()

    def method(self, backbone: Backbone, model: str) -> DynamicViTPolicy:
        """Untrained predictors; initialised from torch's global generator."""
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
