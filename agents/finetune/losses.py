"""Distillation losses of a model with reduced tokens against the dense model."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Played(NamedTuple):
    """The outputs of a student for ``B`` images, with gradient; V visual tokens, P patches.

    Attributes:
        logits: ``(B, classes)``.
        features: ``(B, V, D)`` the visual tokens after the final norm.
        owner: ``(B, P)`` index into V of the token that stands for each patch, -1 if pruned.
        there: ``(B, V)`` which visual tokens are kept at the end.
        shortfall: scalar that the policy adds to the loss for missing its target share of tokens;
            0 for a policy without one.
    """

    logits: Tensor
    features: Tensor
    owner: Tensor
    there: Tensor
    shortfall: Tensor

    @property
    def keep(self) -> Tensor:
        """Share of the visual tokens kept at the end, mean over the images."""
        return self.there.float().sum(1).mean() / self.owner.shape[1]


def logit_loss(logits: Tensor, dense: Tensor) -> Tensor:
    """Mean KL(dense || logits), nats, of ``(B, classes)`` each.

    DynamicViT, Rao et al., NeurIPS 2021, equation 14; the direction is that of its published code.
    """
    logs, target = logits.float().log_softmax(-1), dense.float().log_softmax(-1)
    return F.kl_div(logs, target, log_target=True, reduction="batchmean")


def token_loss(played: Played, dense: Tensor) -> Tensor:
    """Mean squared error between the kept tokens and the dense model's (equation 13).

    A token that stands for several patches is compared with the mean of the dense model's tokens
    for them. The mean is taken over each image's tokens, then over images, so that every image has
    the same weight.

    Args:
        played: the outputs of the reduced model.
        dense: ``(B, P, D)`` the dense model's visual tokens after the final norm.
    """
    features, owner = played.features.float(), played.owner
    batch, count, width = features.shape
    # Pruned patches are collected in one extra token, which is cut off again.
    owner = torch.where(owner >= 0, owner, count)
    total = features.new_zeros(batch, count + 1, width)
    total = total.scatter_add(1, owner[..., None].expand_as(dense), dense.float())
    patches = features.new_zeros(batch, count + 1).scatter_add(
        1, owner, torch.ones_like(owner, dtype=torch.float32)
    )
    target = (total / patches.clamp(min=1)[..., None])[:, :-1]
    there = played.there.float()
    error = (features - target).square().mean(-1) * there
    return (error.sum(1) / there.sum(1).clamp(min=1)).mean()
