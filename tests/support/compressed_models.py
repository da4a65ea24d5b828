"""What tests of compressed models share: small models, and how one is compressed."""

from __future__ import annotations

from typing import Any

import timm
import torch
from test_backbone import family_model, image_for
from torch import nn

import agents
import tokenenv
import tokenenv.vit.digits

TINY = "deit_tiny_patch16_224"


def model_and_images(kind: str = "deit", batch: int = 4) -> tuple[nn.Module, torch.Tensor]:
    backbone = family_model(kind)
    return backbone.model.requires_grad_(True), image_for(backbone, batch)


def digits() -> nn.Module:
    return timm.create_model("digits_vit", pretrained=True)


def deit(**options: Any) -> nn.Module:
    return timm.create_model(TINY, **options)


def compressed(spec: str, model: nn.Module, execution: Any = None) -> tokenenv.CompressedViT:
    return tokenenv.compress(model, agents.parse_policy(spec, len(model.blocks)), execution)
