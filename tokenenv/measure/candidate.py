"""Candidates: one interface for everything that is compared with the dense model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tokenenv.data import ImageSource
from tokenenv.game.cost import Cost
from tokenenv.game.episode import Execution
from tokenenv.game.policy import Method, lengths_known, play
from tokenenv.game.segments import Segments
from tokenenv.ltm.model import LTM
from tokenenv.measure.evaluation import (
    Evaluation,
    evaluate,
    evaluate_model,
    model_macs,
)
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.dense import Dense
from tokenenv.vit.tokens import Tokens

Run = Callable[[Tensor], Any]
"""A function that runs one forward pass of images ``(B, C, H, W)``."""


class Timing(NamedTuple):
    """The forward passes to time for a candidate.

    Attributes:
        run: one forward pass of which only the logits are read.
        compiled: gives the same, compiled by ``torch.compile``: the whole pass if all its shapes
            are known before, else from each decision to the next; None if torch doesn't run it.
        gmacs: 10^9 multiply-adds per image that the pass executes, decisions included (1 MAC = 1
            FLOP).
        limit: the same for the dense model cut to the candidate's token counts, a lower bound of
            the time that these take; None for a model that merges its own tokens.
        dense: forms of the dense model in float32 to time, too, by name, because this one runs like
            them.
        dtype: precision of this one; None: the dense model's.
        runtime: what it runs in.
    """

    run: Run
    compiled: Callable[[], Run] | None
    gmacs: float
    limit: Run | None = None
    dense: Mapping[str, Run] = {}
    dtype: str | None = None
    runtime: str = "torch"


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

    def timing(self, images: Tensor, execution: Execution | None) -> Timing:
        """Prepare timing it on ``images (n, C, H, W)``, which are on the model's device.

        Args:
            images: normalised; multiply-adds and token counts are means over them.
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

    def timing(self, images: Tensor, execution: Execution | None) -> Timing:
        """See :meth:`Candidate.timing`; a random method goes on drawing from pass to pass."""
        backbone, cost = self.backbone, Cost(self.backbone)
        counted, macs, counts = copy.deepcopy(self.method), [], []
        for part in images.split(_COUNTED):
            episode = play(backbone, counted, part)
            macs.append(cost.executed(episode, counted))
            counts.append(torch.stack([*episode.attended, *episode.fed]))
        means = torch.cat(counts, 1).double().mean(1).round().int().tolist()
        attended, fed = means[: len(means) // 2], means[len(means) // 2 :]

        def run() -> Run:
            method = copy.deepcopy(self.method)
            return lambda images: play(backbone, method, images, execution, only_logits=True).logits

        def compiled() -> Run:
            if lengths_known(backbone, self.method):
                return torch.compile(run(), dynamic=False)
            return Segments(backbone, copy.deepcopy(self.method))

        return Timing(
            run(),
            compiled,
            torch.cat(macs).mean().item() / 1e9,
            lambda images: sliced(backbone, images, attended, fed),
        )


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

    def timing(self, images: Tensor, execution: Execution | None) -> Timing:
        """See :meth:`Candidate.timing`; ``execution`` is unused: images keep equal lengths."""
        model = self.model
        macs = model_macs(model, images.shape[1:]) / 1e9
        return Timing(model, lambda: torch.compile(model, dynamic=False), macs)


_COUNTED = 64
"""Images per pass when token counts are taken."""


def sliced(
    backbone: Backbone, images: Tensor, attended: Sequence[int], fed: Sequence[int]
) -> Tensor:
    """Run the dense model on fewer tokens, as the lower bound of what given token counts cost.

    Nothing is decided or gathered: the last tokens are cut off, so the logits are meaningless. Of
    the last block only what the head reads is computed, as for methods.

    Args:
        backbone: the model.
        images: ``(B, C, H, W)``.
        attended: number of tokens in the attention of each block, prefix included.
        fed: number of tokens in the MLP of each block, prefix included.

    Returns:
        Logits ``(B, classes)``.
    """
    tokens = backbone.embed(images, trace=False)
    last = backbone.depth - 1
    for block in range(backbone.depth):
        tokens = _cut(tokens, attended[block])
        if block == last and backbone.reads_prefix:
            return backbone.finish(tokens)
        tokens, _ = backbone.attend(block, tokens)
        tokens = backbone.feed(block, _cut(tokens, fed[block]))
    return backbone.classify(tokens)


def _cut(tokens: Tokens, count: int) -> Tokens:
    return replace(
        tokens,
        x=tokens.x[:, :count],
        alive=tokens.alive[:, :count],
        size=tokens.size[:, :count],
    )
