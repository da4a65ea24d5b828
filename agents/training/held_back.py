"""Held-back images, on which policies are compared while they train."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from agents.finetune.student import Trainee
from agents.training.judgement import Judgement
from agents.workers import ALONE, Workers
from tokenenv.data import ImageSource
from tokenenv.game.policy import Method
from tokenenv.measure.evaluation import Evaluation, evaluate
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.dense import Dense


class HeldBack:
    """Measures policies, and models in training, on images whose dense predictions are known.

    Several processes measure on a share of the images each, and all find the same.

    Args:
        backbone: the dense model.
        source: the images.
        workers: who measures together.

    Raises:
        UserError: fewer images than processes.
    """

    def __init__(self, backbone: Dense, source: ImageSource, workers: Workers = ALONE) -> None:
        self.backbone, self.source, self._workers = backbone, source, workers
        self._share = source.share(workers.rank, workers.count, even=False)
        self._dense = torch.zeros(len(self._share), dtype=torch.long)

    def __len__(self) -> int:
        return len(self._share)

    def prepare(self) -> Iterator[int]:
        """Predict with the dense model; yields images done."""
        for index in torch.arange(len(self._share)).split(64):
            batch = self._share.batch(index)
            if len(batch.index):
                images = batch.images.to(self.backbone.device, self.backbone.dtype)
                with torch.inference_mode():
                    self._dense[batch.index] = self.backbone(images).argmax(1).cpu()
            yield len(index)

    def __call__(self, policy: Method) -> Judgement:
        """Saving, loss and drop of the deterministic policy."""
        assert isinstance(self.backbone, Backbone)
        return self._judged(evaluate(self.backbone, policy, self._share, dense=self._dense))

    def trainee(self, trainee: Trainee, clean: ImageSource) -> Judgement:
        """The same of a fine-tuned model with its weights as they are.

        ``clean``: training images, not augmented, that its statistics may be taken of.
        """
        found = trainee.eval().measured(self._share, self.backbone, dense=self._dense)
        # Of all images in every process: a bound of parts is no part of the bound.
        return replace(self._judged(found), **trainee.judged(clean, self.source))

    def _judged(self, found: Evaluation) -> Judgement:
        numbers = (found.saving, found.losses.mean().item(), found.drop)
        return Judgement(*self._workers.mean(numbers, len(found.labels)))
