"""Candidates: one interface for everything that is compared with the dense model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tokenenv.data import ImageSource
from tokenenv.game.cost import Cost
from tokenenv.game.episode import Execution
from tokenenv.game.policy import Method, play
from tokenenv.ltm.model import LTM
from tokenenv.measure.evaluation import (
    Evaluation,
    evaluate,
    evaluate_model,
    macs_of,
    model_macs,
)
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.dense import Dense

Run = Callable[[], Any]
"""A function that runs one forward pass."""


class Timing(NamedTuple):
    """The forward passes to time for a candidate on some images.

    Attributes:
        ready: prepares a forward pass, untimed, and returns a function that runs it.
        gmacs: 10^9 multiply-adds per image, decisions included (1 MAC = 1 FLOP).
        limit: the same for the dense model cut to the candidate's token counts, a lower bound of
            the time that these take; None for a model that merges its own tokens.
    """

    ready: Callable[[], Run]
    gmacs: float
    limit: Callable[[], Run] | None = None


class Candidate(Protocol):
    """A method on its model, or a model that reduces its own tokens.

    Attributes:
        what: as the user named it.
        frozen: True if its weights are those of the dense model, False if they were fine-tuned.
        key: identifies its predictions: candidates with equal keys give equal predictions.
        group: name of the method without its settings; a sweep shares one.
    """

    @property
    def what(self) -> str: ...  # noqa: D102
    @property
    def frozen(self) -> bool: ...  # noqa: D102
    @property
    def key(self) -> str: ...  # noqa: D102
    @property
    def group(self) -> str: ...  # noqa: D102

    def parameters(self) -> int:
        """Number of parameters of its model, without those of a policy."""

    def evaluate(self, reference: Dense, source: ImageSource, **options: Any) -> Evaluation:
        """Evaluate it and a dense model on the same images.

        Args:
            reference: the dense model.
            source: the images.
            **options: what :func:`~tokenenv.measure.evaluation.evaluate_model` takes.
        """

    def timing(self, images: Tensor, compiled: bool, execution: Execution | None) -> Timing:
        """Prepare timing it on ``images (B, C, H, W)``, which are on the model's device.

        Args:
            images: normalised.
            compiled: whether to use ``torch.compile``: for a method on the per-token parts of
                each block, else on the whole model.
            execution: see :class:`~tokenenv.game.episode.Episode`; None: the device's default.
        """


@dataclass(frozen=True)
class MethodCandidate:
    """A policy or a reducer on a backbone.

    Attributes:
        what, frozen, key, group: see :class:`Candidate`.
        method: the policy or reducer, checked to fit the backbone.
        backbone: the model.
    """

    what: str
    method: Method
    backbone: Backbone
    frozen: bool = True
    key: str = ""
    group: str = ""

    def parameters(self) -> int:
        """Number of parameters of the backbone."""
        return sum(p.numel() for p in self.backbone.parameters())

    def evaluate(self, reference: Dense, source: ImageSource, **options: Any) -> Evaluation:
        """Evaluate a copy of the method on the backbone, see :meth:`Candidate.evaluate`."""
        method = copy.deepcopy(self.method)  # random policies restart from their seed next time
        return evaluate(self.backbone, method, source, reference=reference, **options)

    def timing(self, images: Tensor, compiled: bool, execution: Execution | None) -> Timing:
        """See :meth:`Candidate.timing`; a random method draws the same numbers in each pass."""
        player = copy.copy(self.backbone)
        player.compiled = compiled
        episode = play(self.backbone, copy.deepcopy(self.method), images)
        gmacs = macs_of(episode, self.method, Cost(self.backbone)).mean().item() / 1e9

        def ready() -> Run:
            fresh = copy.deepcopy(self.method)
            return lambda: play(player, fresh, images, execution)

        counts = [_means(part) for part in (episode.attended, episode.fed)]
        cut = compiled_if(compiled, lambda: sliced(self.backbone, images, *counts))
        return Timing(ready, gmacs, lambda: cut)


@dataclass(frozen=True)
class ModelCandidate:
    """A model with LTM blocks.

    Attributes:
        what, frozen, key, group: see :class:`Candidate`.
        model: in eval mode.
    """

    what: str
    model: LTM
    frozen: bool = False
    key: str = ""
    group: str = ""

    def parameters(self) -> int:
        """Number of parameters of the model."""
        return sum(p.numel() for p in self.model.parameters())

    def evaluate(self, reference: Dense, source: ImageSource, **options: Any) -> Evaluation:
        """Evaluate the model, see :meth:`Candidate.evaluate`."""
        lengths = self.model.lengths
        return evaluate_model(self.model, reference, source, lengths=lengths, **options)

    def timing(self, images: Tensor, compiled: bool, execution: Execution | None) -> Timing:
        """See :meth:`Candidate.timing`; ``execution`` is unused: images keep equal lengths."""
        run = compiled_if(compiled, lambda: self.model(images))
        return Timing(lambda: run, model_macs(self.model, images.shape[1:]) / 1e9)


def compiled_if(compiled: bool, run: Run) -> Run:
    """``run`` itself, or compiled by ``torch.compile`` if ``compiled``."""
    made: Run = torch.compile(run) if compiled else run
    return made


def sliced(
    backbone: Backbone, images: Tensor, attended: Sequence[int], fed: Sequence[int]
) -> Tensor:
    """Run the dense model on fewer tokens, as the lower bound of what given token counts cost.

    Nothing is decided or gathered: the last tokens are cut off, so the logits are meaningless.

    Args:
        backbone: the model.
        images: ``(B, C, H, W)``.
        attended: number of tokens in the attention of each block, prefix included.
        fed: number of tokens in the MLP of each block, prefix included.

    Returns:
        Logits ``(B, classes)``.
    """
    tokens = backbone.embed(images)
    for block in range(backbone.depth):
        tokens, _ = backbone.attend(block, tokens.with_x(tokens.x[:, : attended[block]]))
        tokens = backbone.feed(block, tokens.with_x(tokens.x[:, : fed[block]]))
    return backbone.classify(tokens)


def _means(counts: list[Tensor]) -> list[int]:
    return [round(n.double().mean().item()) for n in counts]
