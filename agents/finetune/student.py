"""A model that is trained, and who decides in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenenv.backbone import Backbone
from tokenenv.episode import Execution
from tokenenv.metrics import Decider, play
from tokenenv.multiscale import MultiScaleEmbed
from tokenenv.tokens import Tokens


class Played(NamedTuple):
    """What ``B`` images came to, with gradient; V visual tokens, P patches.

    Attributes:
        logits: ``(B, classes)``.
        features: ``(B, V, D)`` the visual tokens after the final norm.
        owner: ``(B, P)`` index into V of the token that stands for each patch, -1 once pruned.
        there: ``(B, V)`` which visual tokens are there at the end.
        shortfall: what the policy adds to the loss for missing its target; 0 for one that can't.
    """

    logits: Tensor
    features: Tensor
    owner: Tensor
    there: Tensor
    shortfall: Tensor


class Student(nn.Module):
    """A timm model in training under a policy.

    Its parameters are the model's, and the policy's if that learns by gradient: if it has
    ``soft_play``, which plays with decisions that have a gradient.

    Args:
        model: a model of timm's ``VisionTransformer`` family; it is used, not copied.
        policy: who decides.
    """

    backbone: Backbone
    policy: Any

    def __init__(self, model: nn.Module, policy: Decider) -> None:
        super().__init__()
        self.model = model
        self.soft = hasattr(policy, "soft_play")
        # A backbone's parameters are the model's own: not a second time in state_dict().
        self.__dict__["backbone"] = Backbone(model, freeze=False)
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
        features = self.backbone.model.norm(tokens.x)[:, tokens.prefix :]
        return Played(logits, features, _owner(tokens), there, shortfall)

    def added(self) -> Iterator[nn.Parameter]:
        """The parameters that the pretrained model does not have."""
        for module in self.model.modules():
            if isinstance(module, MultiScaleEmbed):
                yield from module.added()
        if self.soft:
            yield from self.policy.parameters()

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


def _owner(tokens: Tokens) -> Tensor:
    return torch.where(tokens.source >= 0, tokens.source - tokens.prefix, -1)
