"""What the commands have in common: the model that their options name."""

from __future__ import annotations

import argparse

import torch

from tokenenv.measure.opening import Model
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.load import EMBEDDED, Dense, check_dtype


def model_of(args: argparse.Namespace) -> Model:
    """The model that ``--model``, ``--weights``, ``--device``, ``--dtype`` name.

    A command without ``--dtype`` computes in float32.
    """
    dtype = getattr(args, "dtype", "float32")
    return Model(args.model or EMBEDDED, args.weights, args.device, dtype)


def open_backbone(args: argparse.Namespace, *, images: bool = True) -> tuple[Backbone, str]:
    """That model, and its name; ``images``: whether the command needs images.

    Raises:
        UserError: see :meth:`~tokenenv.measure.opening.Model.open_backbone`.
    """
    model = model_of(args)
    return model.open_backbone(args.data if images else None, images=images), model.name


def open_dense(args: argparse.Namespace, *, images: bool = True) -> tuple[Dense, str]:
    """:func:`open_backbone` for a model of any family that LTM has blocks for."""
    model = model_of(args)
    return model.open_dense(args.data if images else None, images=images), model.name


def precision(args: argparse.Namespace) -> torch.dtype:
    """What ``--dtype`` asks for; float32 of a command that has no such option."""
    return check_dtype(getattr(args, "dtype", "float32"))
