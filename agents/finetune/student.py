"""Students of fine-tuning: a model in training together with a method that reduces tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save
from torch import Tensor, nn

from agents.finetune.losses import Played, token_loss
from agents.policies import POLICY
from agents.training.run import MODEL
from tokenenv.data import ImageSource
from tokenenv.game.episode import Execution
from tokenenv.game.policy import Method, Policy, play
from tokenenv.measure.evaluation import Evaluation, evaluate
from tokenenv.measure.token_pictures import PICTURE, write_token_pictures
from tokenenv.storage import write_bytes
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.multiscale import MultiScaleEmbed
from tokenenv.vit.tokens import Tokens


class Trainee(nn.Module):
    """The interface of models in fine-tuning: :class:`Student`, or LTM's.

    ``forward`` maps normalised images ``(B, C, H, W)`` to an object with ``logits (B, classes)``,
    with gradient, and ``keep``, the share of the tokens left at the end.

    Attributes:
        model: the model that is trained and saved.
        files: names of the files that :meth:`write` writes.
    """

    model: Any
    files: ClassVar[tuple[str, ...]] = (MODEL,)

    @property
    def device(self) -> torch.device:
        """The parameters' device."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' floating-point type."""
        return next(self.parameters()).dtype

    def terms(self, played: Any, dense: Tensor, labels: Tensor, config: Any) -> dict[str, Tensor]:
        """The terms of the loss beside cross entropy and divergence from the teacher's logits.

        Args:
            played: the output of :meth:`forward`.
            dense: the output of the teacher's ``forward_features`` for the same images.
            labels: ``(B,)`` int64.
            config: the settings.

        Returns:
            Weighted scalars by name.
        """
        raise NotImplementedError

    def before(self, done: int, clean: ImageSource, config: Any) -> None:
        """Called before each update.

        Args:
            done: updates so far.
            clean: training images, not augmented, the same ones in every process.
            config: the settings.
        """

    def remembered(self) -> dict[str, Any]:
        """The state of :meth:`before` that is not in parameters and buffers."""
        return {}

    def remember(self, state: dict[str, Any]) -> None:
        """Restore the state from :meth:`remembered`."""

    def judged(self, clean: ImageSource, held_back: ImageSource) -> dict[str, float]:
        """Further fields of :class:`~agents.training.judgement.Judgement` for this model."""
        return {}

    def added(self) -> Iterator[nn.Parameter]:
        """The parameters that the pretrained model lacks."""
        raise NotImplementedError

    def measured(self, source: ImageSource, teacher: Any, **options: Any) -> Evaluation:
        """The result of :func:`~tokenenv.measure.evaluation.evaluate` for the model now."""
        raise NotImplementedError

    def write(self, folder: Path, source: ImageSource) -> None:
        """Write the files of a run folder; pictures show images of ``source``."""
        state = {name: t.detach().cpu().contiguous() for name, t in self.model.state_dict().items()}
        write_bytes(folder / MODEL, save(state))

    def groups(self, weight_decay: float, added_rate: float) -> list[dict[str, Any]]:
        """Parameter groups for timm's optimisers and schedules.

        Vectors (norms, biases, tokens) have no weight decay; parameters that the pretrained model
        lacks have ``added_rate`` times the learning rate.
        """
        added = {id(parameter) for parameter in self.added()}
        no_decay: set[str] = getattr(self.model, "no_weight_decay", set)()
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            plain = parameter.ndim <= 1 or name.removeprefix("model.") in no_decay
            key = 0.0 if plain else weight_decay, added_rate if id(parameter) in added else 1.0
            groups.setdefault(key, []).append(parameter)
        return [
            {"params": members, "weight_decay": decay, "lr_scale": scale}
            for (decay, scale), members in groups.items()
        ]


class Student(Trainee):
    """A timm model in training whose tokens a method reduces.

    Its parameters are the model's, and also the method's if that is a policy with ``soft_play``,
    which is trained by gradient.

    Args:
        model: a timm model that :class:`Backbone` takes; it is used, not copied.
        policy: the policy or reducer.
    """

    files = (MODEL, POLICY, PICTURE)
    backbone: Backbone
    policy: Any

    def __init__(self, model: nn.Module, policy: Method) -> None:
        super().__init__()
        self.model = model
        self.soft = isinstance(policy, Policy) and policy.soft
        # The backbone's parameters are the model's and must not be in state_dict() twice.
        self.__dict__["backbone"] = Backbone(model, freeze=False, proven=True)
        if self.soft:
            self.policy = policy
        else:
            self.__dict__["policy"] = policy

    def forward(self, images: Tensor) -> Played:
        """The outputs for normalised images ``(B, C, H, W)``."""
        if self.soft and self.training:
            tokens, keep, shortfall = self.policy.soft_play(self.backbone, images)
            logits, there = self.backbone.classify(tokens), keep.detach()
        else:
            # On a CPU removed tokens cost time; on other devices reading lengths would synchronise.
            execution: Execution = "padded" if images.device.type == "cpu" else "masked"
            episode = play(self.backbone, self.policy, images, execution)
            assert episode.logits is not None
            tokens, logits = episode.tokens, episode.logits
            there, shortfall = tokens.visual_alive, logits.new_zeros(())
        features = self.backbone.family.norm(tokens.x)[:, tokens.prefix :]
        return Played(logits, features, _owner(tokens), there, shortfall)

    def terms(self, played: Any, dense: Tensor, labels: Tensor, config: Any) -> dict[str, Tensor]:
        """The weighted squared error of the kept tokens, and the policy's own term."""
        return {
            "token_loss": config.token_loss * token_loss(played, dense[:, self.backbone.prefix :]),
            "shortfall": played.shortfall,
        }

    def added(self) -> Iterator[nn.Parameter]:
        """The parameters that the pretrained model lacks."""
        for module in self.model.modules():
            if isinstance(module, MultiScaleEmbed):
                yield from module.added()
        if self.soft:
            yield from self.policy.parameters()

    def measured(self, source: ImageSource, teacher: Any, **options: Any) -> Evaluation:
        """The result of :func:`tokenenv.measure.evaluation.evaluate` with the policy."""
        return evaluate(self.backbone, self.policy, source, reference=teacher, **options)

    def write(self, folder: Path, source: ImageSource) -> None:
        """Write model, policy, and a picture of the tokens that are removed."""
        super().write(folder, source)
        self.policy.save(folder / POLICY)
        write_token_pictures(folder / PICTURE, self.backbone, self.policy, source)


def _owner(tokens: Tokens) -> Tensor:
    return torch.where(tokens.owners >= 0, tokens.owners - tokens.prefix, -1)
