"""Speed-up of methods over the dense model, and the limit their token counts set."""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm import tqdm

from tokenenv.api.opening import Opened, each_once, open_candidates
from tokenenv.data import Preprocessing
from tokenenv.errors import UserError, check_choice, check_keywords
from tokenenv.game.checks import MOST_IMAGES, MOST_ROUNDS, check_threads, check_whole
from tokenenv.game.episode import Execution
from tokenenv.machine import compiler_found, describe_machine, fast_bfloat16
from tokenenv.measure.candidate import Candidate, MethodCandidate
from tokenenv.measure.opening import images_to_time, named_model, text
from tokenenv.measure.speed import Compiled, Speed, pool_size, timings
from tokenenv.measure.speed import bench as time_all
from tokenenv.onnx_file import ONNX
from tokenenv.reducers import Resize
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.load import check_device, check_dtype


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
            f"<tr><td>{row.batch}</td><td>{row.dtype}</td><th>{html.escape(row.name)}</th>"
            f"<td>{row.images_per_s:.1f}</td><td>{row.speedup:.3f}</td>"
            f"<td>{row.speedup_q25:.3f} to {row.speedup_q75:.3f}</td><td>{row.gmacs:.4f}</td></tr>"
            for row in self.rows
        )
        title = f"{self.model}, {self.conditions}"
        return (
            f"<table><caption>{html.escape(title)}</caption><tr><th>batch</th><th>precision</th>"
            f"<th></th><th>images/s</th><th>speed-up</th><th>quartiles</th><th>GMACs</th></tr>"
            f"{lines}</table>"
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
    compile: Compiled = "dense",
    smaller: bool = True,
    device: str = "cpu",
    dtype: str | Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    trust: bool = False,
    show: Callable[[Speeds], object] | None = None,
) -> Speeds:
    """Time the dense model and methods in turns, in one process; as ``tokenenv bench``.

    Every timed pass gets another batch. The speed-up is over the fastest form of the dense model.

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
        compile: what is also timed as compiled by ``torch.compile``: ``"none"``, the ``"dense"``
            model, which takes up to a minute for each batch size and precision, or ``"all"``. A
            machine without a compiler leaves this out and says so.
        smaller: whether to time the model on smaller images, too, with about 62 % of the tokens.
        device: see :func:`tokenenv.evaluate`.
        dtype: precision of the models, one or several; None: ``"float32"``, and ``"bfloat16"`` on
            devices that are faster with it.
        preprocessing: see :func:`tokenenv.evaluate`.
        trust: see :func:`tokenenv.evaluate`.
        show: called with the times so far, first without rows and then after each batch size, so
            that they are not lost after Ctrl-C.

    Raises:
        UserError: an argument is wrong; the message names it and the remedy.
    """
    batches = [check_whole("batch", size, 1, MOST_IMAGES + 1) for size in dict.fromkeys(batch)]
    if not batches:
        raise UserError("batch is empty: give at least one batch size")
    check_whole("rounds", rounds, 1, MOST_ROUNDS + 1)
    check_choice("compile", compile, Compiled)
    if threads is not None:
        torch.set_num_threads(check_threads(threads))
    whats, found = each_once(what), None
    if any(isinstance(one, str) and one.endswith(ONNX) for one in whats):
        dtype = dtype or "float32"  # files have no other
    for precision in _precisions(dtype, device):
        opened = open_candidates(
            whats,
            named_model(model, weights, device, precision, preprocessing),
            images=False,
            trust=trust,
        )
        candidates = [*opened.candidates, *(_smaller(opened) if smaller else ())]
        images, origin = images_to_time(
            opened.dense, opened.model.name, text(data, "data"), pool_size(max(batches))
        )
        if found is None:
            missing = compile != "none" and not compiler_found()
            found = Speeds(opened.model.name, _conditions(opened, origin, rounds, missing), ())
            compile = "none" if missing else compile
            if show:
                show(found)
        for size in batches:
            total = timings(candidates, rounds, compile)
            label = f"{precision}, batch {size}"
            with tqdm(total=total, desc=label, leave=False, disable=None) as bar:
                rows = time_all(
                    opened.dense,
                    candidates,
                    images,
                    batch=size,
                    rounds=rounds,
                    compiled=compile,
                    execution=execution,
                    progress=bar.update,
                )
            found = replace(found, rows=(*found.rows, *rows))
            if show:
                show(found)
    assert found is not None
    return found


def _precisions(dtype: str | Sequence[str] | None, device: str) -> list[str]:
    if dtype is None:
        fast = fast_bfloat16(check_device(device))
        return ["float32", "bfloat16"] if fast else ["float32"]
    found = [dtype] if isinstance(dtype, str) else list(dict.fromkeys(dtype))
    if not found:
        raise UserError("dtype is empty: give at least one precision, such as float32")
    for name in found:
        check_dtype(name)
    return found


def _conditions(opened: Opened, origin: str, rounds: int, missing: bool) -> str:
    """Images, machine and rounds; ``missing``: whether there is no compiler."""
    compiler = "; no C++ compiler: nothing is compiled" if missing else ""
    return (
        f"{origin}, {describe_machine(opened.dense.device)}, median of {rounds} rounds, a fresh "
        f"batch in every pass (1 MAC = 1 FLOP){compiler}"
    )


def _smaller(opened: Opened) -> list[Candidate]:
    """The model on images of about 79 % of the side, if it can take them and nobody named it."""
    dense = opened.dense
    if not isinstance(dense, Backbone) or any("resize" in each.what for each in opened.candidates):
        return []
    patch, side = dense.family.patch_size[0], dense.image_shape[1]
    method = Resize(size=max(1, round(_SIDE * side / patch)) * patch)
    try:
        method.check(dense)
    except UserError:  # images or patches that are not square
        return []
    return [MethodCandidate(f"resize:size={method.size}", method, dense)]


_SIDE = 176 / 224
