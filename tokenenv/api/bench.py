"""Speed-up of methods over the dense model, and the limit their token counts set."""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tokenenv.api.opening import Opened, each_once, open_candidates
from tokenenv.data import Preprocessing, open_source
from tokenenv.data.pixels import Preprocess
from tokenenv.errors import UserError, check_keywords
from tokenenv.game.checks import check_whole
from tokenenv.game.episode import Execution
from tokenenv.measure.opening import named_model, text
from tokenenv.measure.speed import Speed, timings
from tokenenv.measure.speed import bench as time_all
from tokenenv.vit.load import DIGITS_MODELS


@dataclass(frozen=True)
class Speeds:
    """Times of the dense model and of methods.

    Attributes:
        model: timm's name of the dense model.
        conditions: images, device, precision, threads and rounds, in words.
        rows: for each batch size the dense model's row, then those of the methods.
    """

    model: str
    conditions: str
    rows: tuple[Speed, ...]

    def to_dict(self) -> dict[str, Any]:
        """All attributes, as JSON."""
        return {"model": self.model, "conditions": self.conditions, "rows": self.records()}

    def records(self) -> list[dict[str, Any]]:
        """One flat dict per row, as ``pandas.DataFrame`` takes them."""
        return [row.to_dict() for row in self.rows]

    def _repr_html_(self) -> str:
        lines = "".join(
            f"<tr><td>{row.batch}</td><th>{html.escape(row.what)}</th>"
            f"<td>{row.images_per_s:.1f}</td><td>{row.speedup:.3f}</td>"
            f"<td>{row.speedup_q25:.3f} to {row.speedup_q75:.3f}</td><td>{row.gmacs:.4f}</td></tr>"
            for row in self.rows
        )
        title = f"{self.model}, {self.conditions}"
        return (
            f"<table><caption>{html.escape(title)}</caption><tr><th>batch</th><th></th>"
            f"<th>images/s</th><th>speed-up</th><th>quartiles</th><th>GMACs</th></tr>{lines}</table>"
        )


@check_keywords
def bench(
    what: Sequence[Any],
    *,
    model: str | None = None,
    weights: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    batch: Sequence[int] = (1, 8, 64),
    threads: int | None = None,
    rounds: int = 7,
    execution: Execution | None = None,
    compile: bool | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    preprocessing: Preprocessing | None = None,
    trust: bool = False,
    show: Callable[[Speeds], object] | None = None,
) -> Speeds:
    """Time the dense model and methods in turns, in one process; as ``tokenenv bench``.

    Args:
        what: methods, each as :func:`tokenenv.evaluate` takes it.
        model: see :func:`tokenenv.evaluate`.
        weights: see :func:`tokenenv.evaluate`.
        data: images; None: the digits for an embedded model, random images for others.
        batch: batch sizes.
        threads: number of threads of torch; None: unchanged.
        rounds: number of timings of each method.
        execution: how images of different lengths share a batch, see
            :class:`~tokenenv.game.episode.Episode`; None: the device's default.
        compile: whether to use ``torch.compile`` for all of them; None: only on CUDA.
        device: see :func:`tokenenv.evaluate`.
        dtype: see :func:`tokenenv.evaluate`.
        preprocessing: see :func:`tokenenv.evaluate`.
        trust: see :func:`tokenenv.evaluate`.
        show: called with the times so far, first without rows and then after each batch size, so
            that they are not lost after Ctrl-C.

    Raises:
        UserError: an argument is wrong; the message names it and the remedy.
    """
    batches = [check_whole("batch", size, 1) for size in dict.fromkeys(batch)]
    if not batches:
        raise UserError("batch is empty: give at least one batch size")
    check_whole("rounds", rounds, 1)
    if threads is not None:
        torch.set_num_threads(check_whole("threads", threads, 1))
    whats = each_once(what)
    opened = open_candidates(
        whats, named_model(model, weights, device, dtype, preprocessing), images=False, trust=trust
    )
    images, origin = _images(opened, text(data), max(batches))
    compiled = compile if compile is not None else opened.dense.device.type == "cuda"
    conditions = (
        f"{origin}, {device}, {dtype}{', compiled' if compiled else ''}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, median of {rounds} rounds "
        "(1 MAC = 1 FLOP)"
    )
    found = Speeds(opened.model.name, conditions, ())
    if show:
        show(found)
    for size in batches:
        some = images[torch.arange(size, device=images.device) % len(images)]
        total = timings(opened.candidates, rounds)
        with tqdm(total=total, desc=f"batch {size}", leave=False, disable=None) as bar:
            rows = time_all(
                opened.dense,
                opened.candidates,
                some,
                rounds=rounds,
                compiled=compiled,
                execution=execution,
                progress=bar.update,
            )
        found = Speeds(found.model, conditions, (*found.rows, *rows))
        if show:
            show(found)
    return found


def _images(opened: Opened, data: str | None, count: int) -> tuple[Tensor, str]:
    """At most ``count`` images ``(n, C, H, W)``, normalised, and where they are from, in words."""
    dense = opened.dense
    if data is None and opened.model.name not in DIGITS_MODELS:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn((count, *Preprocess(dense.model).shape), generator=generator)
        return images.to(dense.device, dense.dtype), "random images"
    source = open_source(data, dense.model, split="test", limit=count)
    images = source.batch(torch.arange(len(source))).images
    if not len(images):
        raise UserError(f"no image of '{source.name}' could be read: check the files")
    return images.to(dense.device, dense.dtype), f"{len(images)} images of {source.name}"
