"""A compressed model as an ONNX file, for runtimes without torch."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tokenenv.deploy.compressed import CompressedViT
from tokenenv.errors import UserError, check_interrupt
from tokenenv.paths import as_path
from tokenenv.storage import write_bytes


def check_export() -> None:
    """Raise :class:`UserError` where a package that the export needs is missing."""
    for name in ("onnx", "onnxscript"):
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"the export needs the package '{name}': pip install 'tokenenv[export]'"
            )


def export_onnx(fast: CompressedViT, path: str | Path) -> None:
    """Write the model as it runs for one image: ``(1, C, H, W)`` -> ``(1, classes)``.

    Removed tokens are dropped, so the number of tokens depends on the image; in ONNX it is a
    dynamic dimension, which is why a batch has one image. A model with ``execution="masked"`` has
    fixed shapes and saves nothing. Random policies use the runtime's random numbers.

    Args:
        fast: the model; a copy is exported in ``eval`` mode on a CPU.
        path: the file to write.

    Raises:
        UserError: the file can't be written; as :func:`onnx_bytes`.
    """
    path = as_path(path, "path")
    if path.is_dir() or not path.parent.is_dir():  # before a minute of work
        raise UserError(f"cannot write '{path}': give the name of a file in a folder that exists")
    write_bytes(path, onnx_bytes(fast))


def onnx_bytes(fast: CompressedViT) -> bytes:
    """The content of the file that :func:`export_onnx` writes.

    Raises:
        UserError: a package is missing (``pip install tokenenv[export]``), the model is not in
            float32, or torch can't export something that the policy does.
    """
    check_export()
    if fast.backbone.dtype != torch.float32:
        dtype = str(fast.backbone.dtype).removeprefix("torch.")
        raise UserError(f"the export writes float32 only, not {dtype}: give it model.float()")
    fast = copy.deepcopy(fast).cpu().eval()
    image = torch.zeros((1, *fast.backbone.image_shape))
    try:
        with warnings.catch_warnings(), torch.no_grad(), _quiet("onnxscript"), _quiet("torch"):
            warnings.simplefilter("ignore")  # torch's own, which a user can't act on
            graph = torch.export.export(fast, (image,), strict=False)
            program = torch.onnx.export(
                graph,
                input_names=["images"],
                output_names=["logits"],
                dynamo=True,
                verbose=False,
                custom_translation_table={torch.ops.aten.sort.stable: _stable_sort()},
            )
    except Exception as error:  # torch raises many kinds for what it can't trace or translate
        check_interrupt(error)
        kind = type(fast.policy).__name__
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(
            f"torch can't export a policy of class {kind} ({reason[:200]}): take another policy, "
            "or try execution='masked', which fixes the shapes and saves nothing"
        ) from error
    assert program is not None
    with tempfile.TemporaryDirectory() as place:
        complete = Path(place, "model.onnx")
        program.save(complete, external_data=False)
        return complete.read_bytes()


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Silence a logger's warnings, such as those about constants that can't be folded."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _stable_sort() -> Any:
    """A translation of ``aten::sort.stable``, for which torch has none, to ONNX's TopK.

    TopK puts equal values in the order of their indices, so it is stable.
    """
    from onnx import TensorProto
    from onnxscript import opset18

    op: Any = opset18

    def sort(
        x: Any, *, stable: bool = True, dim: int = -1, descending: bool = False
    ) -> tuple[Any, Any]:
        if x.dtype == TensorProto.UINT8:  # for which TopK is not implemented everywhere
            x = op.Cast(x, to=TensorProto.INT64)
        count = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]))
        values, indices = op.TopK(x, count, axis=dim, largest=int(descending), sorted=1)
        return values, indices

    return sort
