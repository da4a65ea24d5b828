"""Accuracy, multiply-adds and speed of a method beside the dense model."""

from __future__ import annotations

import html
import os
from dataclasses import dataclass
from typing import Any

from tokenenv.api.latency import cost_of
from tokenenv.api.opening import open_candidates
from tokenenv.data import ImageSource, Preprocessing, open_source
from tokenenv.errors import check_keywords
from tokenenv.game.checks import MOST_IMAGES, check_whole
from tokenenv.measure.evaluation import Evaluation
from tokenenv.measure.opening import named_model, text
from tokenenv.measure.printing import evaluation_bar, evaluation_json


@dataclass(frozen=True, repr=False)
class Evaluated:
    """The result of evaluating a method beside the dense model.

    Attributes:
        what: the method, as it was named.
        model: timm's name of the dense model.
        dtype: precision that both models computed in.
        frozen: True if the method ran on the dense model's weights, False if on fine-tuned ones.
        parameters, parameters_dense: number of parameters of the method's model and of the dense.
        source: the images.
        evaluation: predictions and costs of every image.
    """

    what: str
    model: str
    dtype: str
    frozen: bool
    parameters: int
    parameters_dense: int
    source: ImageSource
    evaluation: Evaluation

    def to_dict(self) -> dict[str, Any]:
        """All numbers and the predictions for every image, as JSON."""
        numbers = evaluation_json(self.model, self.source, self.evaluation) | {"dtype": self.dtype}
        if self.parameters != self.parameters_dense:
            numbers |= {"parameters": self.parameters, "parameters_dense": self.parameters_dense}
        if not self.frozen:
            numbers["frozen"] = False
        return {**numbers, "predictions": self.predictions()}

    def predictions(self) -> list[dict[str, Any]]:
        """One dict per image: ``file``, and its ``label``, ``dense`` and ``reduced`` class."""
        result, files = self.evaluation, self.source.files
        columns = (result.index, result.labels, result.dense, result.reduced)
        return [
            {"file": files[index], "label": label, "dense": dense, "reduced": reduced}
            for index, label, dense, reduced in zip(*(c.tolist() for c in columns), strict=True)
        ]

    def __repr__(self) -> str:
        r = self.evaluation.report()
        return (
            f"<Evaluated {self.what} on {self.model}: top-1 {r['top1']:.2f} % (dense "
            f"{r['top1_dense']:.2f} %), {self.evaluation.saving:.1f} % fewer MACs, "
            f"{r['images']} images>"
        )

    def _repr_html_(self) -> str:
        r = self.evaluation.report()
        rows = [
            ("dense", r["top1_dense"], r["gmacs_dense"], r["images_per_s_dense"]),
            (self.what, r["top1"], r["gmacs"], r["images_per_s"]),
        ]
        lines = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{top1:.2f}</td><td>{gmacs:.4f}</td>"
            f"<td>{speed:.1f}</td></tr>"
            for name, top1, gmacs, speed in rows
        )
        title = f"{self.model}, {r['images']} images of {self.source.name} (1 MAC = 1 FLOP)"
        return (
            f"<table><caption>{html.escape(title)}</caption><tr><th></th><th>top-1 %</th>"
            f"<th>GMACs/image</th><th>images/s</th></tr>{lines}</table>"
        )


@check_keywords
def evaluate(
    what: Any,
    *,
    model: str | None = None,
    weights: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    batch: int = 64,
    restrict: bool = False,
    device: str = "cpu",
    dtype: str = "float32",
    time_batch: int | None = None,
    preprocessing: Preprocessing | None = None,
    trust: bool = False,
) -> Evaluated:
    """Run every image through the dense model and through a method; as ``tokenenv evaluate``.

    Args:
        what: a word such as ``"tome:r=8"``; the folder of a run, an LTM model or a compressed
            model; the name of a shipped policy; ``"module:Name:key=value"`` or
            ``"file.py:Name:key=value"`` for your own; or the policy, reducer, run or model itself.
        model: timm's name of the model; None: the one ``what`` was trained on, else ``digits_vit``.
        weights: a ``.safetensors`` or ``.pth`` state dict, or ``"random"``; None: the embedded
            weights or timm's.
        data: a folder of class/image, or a torchvision data set such as ``"CIFAR10:ROOT"``; None:
            those that belong to an embedded model.
        limit: largest number of images; None: all.
        batch: images per batch.
        restrict: predict only among the classes of ``data`` (the ImageNet-A and -R protocol).
        device: ``"cpu"``, ``"cuda"`` ...
        dtype: precision of the models: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        time_batch: batch size for which to predict the time as well, from a table of this machine
            that is measured if it is not in the cache; see :func:`tokenenv.latency_table`.
        preprocessing: replaces that of the run or the model that ``what`` names, or timm's.
        trust: whether to run third-party code that a saved method names, see :func:`agents.load`.

    Raises:
        UserError: an argument is wrong; the message names it and the remedy.
    """
    check_whole("batch", batch, 1, MOST_IMAGES + 1)
    if limit is not None:
        check_whole("limit", limit, 1)
    opened = open_candidates(
        [what],
        named_model(model, weights, device, dtype, preprocessing),
        data=text(data, "data"),
        trust=trust,
    )
    (candidate,) = opened.candidates
    times: dict[str, Any] = {}
    if time_batch is not None:
        times["cost"] = cost_of(candidate, time_batch)
    source = open_source(text(data, "data"), opened.dense.model, split="test", limit=limit)
    with evaluation_bar(source) as progress:
        found = candidate.evaluate(
            opened.dense, source, batch_size=batch, restrict=restrict, progress=progress, **times
        )
    return Evaluated(
        what=candidate.what,
        model=opened.model.name,
        dtype=dtype,
        frozen=candidate.frozen,
        parameters=candidate.parameters(),
        parameters_dense=sum(p.numel() for p in opened.dense.parameters()),
        source=source,
        evaluation=found,
    )
