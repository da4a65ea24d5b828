"""Candidates: what is evaluated, timed and compared beside the dense model, all in one way."""

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
"""One forward pass."""


class Timing(NamedTuple):
    """What there is to time of a candidate on some images.

    Attributes:
        ready: makes a forward pass; what it prepares is not timed.
        gmacs: 10^9 multiply-adds per image, decisions included (1 MAC = 1 FLOP).
        limit: makes a forward pass of the dense model cut to the candidate's token counts, the
            least that these cost; None of a model that merges by itself.
    """

    ready: Callable[[], Run]
    gmacs: float
    limit: Callable[[], Run] | None = None


class Candidate(Protocol):
    """A method on its model, or a model that reduces its tokens by itself.

    Attributes:
        what: as the user named it.
        frozen: whether its weights are those of the dense model; else they were fine-tuned.
        key: the same for two candidates only if they give the same predictions.
        group: the method, of which this is one setting.
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
        """How many parameters its model has, those of a policy apart."""

    def evaluate(self, reference: Dense, source: ImageSource, **options: Any) -> Evaluation:
        """Its accuracy and cost beside a dense model's.

        Args:
            reference: the dense model.
            source: the images.
            **options: what :func:`~tokenenv.measure.evaluation.evaluate_model` takes.
        """

    def timing(self, images: Tensor, compiled: bool, execution: Execution | None) -> Timing:
        """What there is to time on ``images (B, C, H, W)``, on the model's device.

        Args:
            images: normalised.
            compiled: whether ``torch.compile`` works on it: on what a block does to each token
                where a method runs, else on the whole model.
            execution: see :class:`~tokenenv.game.episode.Episode`; None takes what suits the
                device.
        """


@dataclass(frozen=True)
class MethodCandidate:
    """A policy or a reducer on a backbone.

    Attributes:
        what, frozen, key, group: see :class:`Candidate`.
        method: it fits the backbone.
        backbone: the model.
    """

    what: str
    method: Method
    backbone: Backbone
    frozen: bool = True
    key: str = ""
    group: str = ""

    def parameters(self) -> int:
        """Those of the backbone."""
        return sum(p.numel() for p in self.backbone.parameters())

    def evaluate(self, reference: Dense, source: ImageSource, **options: Any) -> Evaluation:
        """See :class:`Candidate`."""
        method = copy.deepcopy(self.method)  # one that draws starts afresh the next time
        return evaluate(self.backbone, method, source, reference=reference, **options)

    def timing(self, images: Tensor, compiled: bool, execution: Execution | None) -> Timing:
        """See :class:`Candidate`; a method draws the same numbers in each pass."""
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
        """Those of the model."""
        return sum(p.numel() for p in self.model.parameters())

    def evaluate(self, reference: Dense, source: ImageSource, **options: Any) -> Evaluation:
        """See :class:`Candidate`."""
        lengths = self.model.lengths
        return evaluate_model(self.model, reference, source, lengths=lengths, **options)

    def timing(self, images: Tensor, compiled: bool, execution: Execution | None) -> Timing:
        """See :class:`Candidate`; ``execution`` does not matter, all images are alike."""
        run = compiled_if(compiled, lambda: self.model(images))
        return Timing(lambda: run, model_macs(self.model, images.shape[1:]) / 1e9)


def compiled_if(compiled: bool, run: Run) -> Run:
    """A forward pass, through ``torch.compile`` if asked."""
    made: Run = torch.compile(run) if compiled else run
    return made


def sliced(
    backbone: Backbone, images: Tensor, attended: Sequence[int], fed: Sequence[int]
) -> Tensor:
    """The dense model with its token tensor cut: what given token counts cost at the least.

    Nothing is decided or gathered: the last tokens are cut off. The logits mean nothing.

    Args:
        backbone: the model.
        images: ``(B, C, H, W)``.
        attended: for each block how many tokens its attention works on, prefix included.
        fed: the same for its MLP.

    Returns:
        ``(B, classes)``.
    """
    tokens = backbone.embed(images)
    for block in range(backbone.depth):
        tokens, _ = backbone.attend(block, tokens.with_x(tokens.x[:, : attended[block]]))
        tokens = backbone.feed(block, tokens.with_x(tokens.x[:, : fed[block]]))
    return backbone.classify(tokens)


def _means(counts: list[Tensor]) -> list[int]:
    return [round(n.double().mean().item()) for n in counts]
