"""Held-back training images, on which policies are compared during training."""

from __future__ import annotations

from dataclasses import replace

import torch
from tqdm import tqdm

from agents.finetune.student import Trainee
from agents.training.judgement import Judgement
from agents.workers import ALONE, Workers
from tokenenv.data import ImageSource
from tokenenv.game.latency import TimeCost
from tokenenv.game.policy import Method
from tokenenv.measure.evaluation import Evaluation, dense_predictions, evaluate
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.dense import Dense


class HeldBack:
    """Measures policies, and models in training, on the held-back images.

    The dense model's predictions are computed once, by :meth:`prepare`. Several processes measure
    a share of the images each; all of them return the result for all images.

    Args:
        backbone: the dense model.
        source: the held-back images.
        workers: the processes that train together.
        cost: predicts the time whose saving is judged; None: multiply-adds are.

    Raises:
        UserError: there are fewer images than processes.
    """

    def __init__(
        self,
        backbone: Dense,
        source: ImageSource,
        workers: Workers = ALONE,
        cost: TimeCost | None = None,
    ) -> None:
        self.backbone, self.source, self._workers = backbone, source, workers
        self.cost = cost
        self._share = source.share(workers.rank, workers.count, even=False)
        self._dense = torch.zeros(len(self._share), dtype=torch.long)

    def __len__(self) -> int:
        return len(self._share)

    def prepare(self) -> None:
        """Predict with the dense model, with a progress bar.

        Raises:
            UserError: no image is readable.
        """
        with tqdm(
            total=len(self), unit="image", desc="dense model", leave=False, disable=None
        ) as bar:
            self._dense = dense_predictions(self.backbone, self._share, progress=bar.update)
        self.source.check_readable()

    def __call__(self, policy: Method) -> Judgement:
        """Saving, loss and drop of the deterministic policy on all held-back images."""
        assert isinstance(self.backbone, Backbone)
        found = evaluate(self.backbone, policy, self._share, dense=self._dense, cost=self.cost)
        return self._judged(found)

    def trainee(self, trainee: Trainee, clean: ImageSource) -> Judgement:
        """The same for a model in fine-tuning, with its current weights.

        ``clean``: training images without augmentation, for statistics such as LTM's bound.
        """
        found = trainee.eval().measured(self._share, self.backbone, dense=self._dense)
        # Every process computes the bound on all images: it is no mean of bounds on parts.
        return replace(self._judged(found), **trainee.judged(clean, self.source))

    def _judged(self, found: Evaluation) -> Judgement:
        numbers = (found.cost_saving, found.losses.mean().item(), found.drop)
        return Judgement(*self._workers.mean(numbers, len(found.labels)))
