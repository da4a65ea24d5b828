"""What is trained: a model, and what loses tokens in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save
from torch import Tensor, nn

from agents.finetune.losses import Played, token_loss
from tokenenv.data import ImageSource
from tokenenv.game.episode import Execution
from tokenenv.game.policy import Method, Policy, play
from tokenenv.measure import evaluation as metrics
from tokenenv.measure.token_pictures import write_token_pictures
from tokenenv.storage import write_bytes
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.multiscale import MultiScaleEmbed
from tokenenv.vit.tokens import Tokens


class Trainee(nn.Module):
    """A model in training, whatever it loses its tokens to; :class:`Student` or LTM's.

    ``forward`` takes images ``(B, C, H, W)``, normalised, and gives what has ``logits
    (B, classes)``, with gradient, and ``keep``, the share of the tokens left at the end.

    Attributes:
        model: what is trained, and whose weights are kept.
        files: what :meth:`write` writes.
    """

    model: Any
    files: ClassVar[tuple[str, ...]] = ("model.safetensors",)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' floating-point type."""
        return next(self.parameters()).dtype

    def terms(self, played: Any, dense: Tensor, labels: Tensor, config: Any) -> dict[str, Tensor]:
        """What the loss has beside cross entropy and the divergence from the teacher's logits.

        Args:
            played: what :meth:`forward` gave.
            dense: what the teacher's ``forward_features`` gave for the same images.
            labels: ``(B,)`` int64.
            config: the settings.
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
        """What :meth:`before` keeps between updates, beside parameters and buffers."""
        return {}

    def remember(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`remembered`."""

    def judged(self, clean: ImageSource, held_back: ImageSource) -> dict[str, float]:
        """Fields of :class:`~agents.training.judgement.Judgement` that not all trainees have."""
        return {}

    def added(self) -> Iterator[nn.Parameter]:
        """The parameters that the pretrained model does not have."""
        raise NotImplementedError

    def measured(self, source: ImageSource, teacher: Any, **options: Any) -> metrics.Evaluation:
        """:func:`~tokenenv.measure.evaluation.evaluate` of the model as it is."""
        raise NotImplementedError

    def write(self, folder: Path, source: ImageSource) -> None:
        """Write all that ``evaluate`` and others need; pictures show images of ``source``."""
        state = {name: t.detach().cpu().contiguous() for name, t in self.model.state_dict().items()}
        write_bytes(folder / "model.safetensors", save(state))

    def groups(self, weight_decay: float, added_rate: float) -> list[dict[str, Any]]:
        """Parameters as timm's optimisers and schedules take them.

        Vectors (norms, biases, tokens) don't decay; what the pretrained model does not have learns
        ``added_rate`` times as fast.
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
    """A timm model in training under a policy.

    Its parameters are the model's, and the policy's if that learns by gradient: if it has
    ``soft_play``, which plays with decisions that have a gradient.

    Args:
        model: a timm model that :class:`Backbone` takes; it is used, not copied.
        policy: who decides.
    """

    files = ("model.safetensors", "policy.safetensors", "tokens.png")
    backbone: Backbone
    policy: Any

    def __init__(self, model: nn.Module, policy: Method) -> None:
        super().__init__()
        self.model = model
        self.soft = isinstance(policy, Policy) and policy.soft
        # A backbone's parameters are the model's own: not a second time in state_dict().
        self.__dict__["backbone"] = Backbone(model, freeze=False, proven=True)
        if self.soft:
            self.policy = policy
        else:
            self.__dict__["policy"] = policy

    def forward(self, images: Tensor) -> Played:
        """Images ``(B, C, H, W)``, normalised -> how they fared."""
        if self.soft and self.training:
            tokens, keep, shortfall = self.policy.soft_play(self.backbone, images)
            logits, there = self.backbone.classify(tokens), keep.detach()
        else:
            # Tokens that left cost time on a CPU; elsewhere asking for lengths would.
            execution: Execution = "padded" if images.device.type == "cpu" else "masked"
            episode = play(self.backbone, self.policy, images, execution)
            assert episode.logits is not None
            tokens, logits = episode.tokens, episode.logits
            there, shortfall = tokens.visual_alive, logits.new_zeros(())
        features = self.backbone.family.norm(tokens.x)[:, tokens.prefix :]
        return Played(logits, features, _owner(tokens), there, shortfall)

    def terms(self, played: Any, dense: Tensor, labels: Tensor, config: Any) -> dict[str, Tensor]:
        """The squared error of the tokens left, and what the policy adds."""
        return {
            "token_loss": config.token_loss * token_loss(played, dense[:, self.backbone.prefix :]),
            "shortfall": played.shortfall,
        }

    def added(self) -> Iterator[nn.Parameter]:
        """The parameters that the pretrained model does not have."""
        for module in self.model.modules():
            if isinstance(module, MultiScaleEmbed):
                yield from module.added()
        if self.soft:
            yield from self.policy.parameters()

    def measured(self, source: ImageSource, teacher: Any, **options: Any) -> metrics.Evaluation:
        """:func:`tokenenv.measure.evaluation.evaluate` under the policy."""
        return metrics.evaluate(self.backbone, self.policy, source, reference=teacher, **options)

    def write(self, folder: Path, source: ImageSource) -> None:
        """Model, policy, and a picture of which tokens leave."""
        super().write(folder, source)
        self.policy.save(folder / "policy.safetensors")
        write_token_pictures(folder / "tokens.png", self.backbone, self.policy, source)


def _owner(tokens: Tokens) -> Tensor:
    return torch.where(tokens.source >= 0, tokens.source - tokens.prefix, -1)
