"""A compressed model as an ONNX file, for runtimes without torch."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenenv.deploy.compressed import CompressedViT
from tokenenv.deploy.runtime import OnnxModel
from tokenenv.errors import UserError, check_interrupt
from tokenenv.game.policy import lengths_known
from tokenenv.onnx_file import check_packages, described
from tokenenv.paths import as_path
from tokenenv.storage import write_bytes

OPSET = 20
"""Version of ONNX's operators that files have; ONNX Runtime knows it since 1.17."""

MOST_APART = 1e-4
"""Largest difference between the logits of a file and those of the model that is accepted."""

Show = Callable[[str], object]
_LARGEST_BATCH = 2**16 - 1


def check_export() -> None:
    """Raise :class:`UserError` where a package that the export needs is missing."""
    check_packages("onnx", "onnxscript", "onnxruntime")


def takes_batches(fast: CompressedViT) -> bool:
    """Whether the ONNX file of a model takes a batch of any size, or one image at a time."""
    return fast.execution in ("masked", "padded") or lengths_known(fast.backbone, fast.policy)


def export_onnx(fast: CompressedViT, path: str | Path, show: Show = lambda step: None) -> None:
    """Write the model as ONNX: ``images (B, C, H, W)`` -> ``logits (B, classes)``, float32.

    Removed tokens are dropped. A method that leaves as many tokens of every image (ToMe, EViT,
    DiffRate, top-k, resize ...) takes any number of images. Of others the number of tokens depends
    on the image, and B is 1; with ``execution="padded"`` they take batches in which images are
    padded to the longest, with ``execution="masked"`` batches that save nothing. Random policies
    use the runtime's random numbers.

    The file's metadata has an entry ``tokenenv``, JSON with the preprocessing, class names, method
    and measured numbers.

    Args:
        fast: the model; a copy is exported in ``eval`` mode on a CPU.
        path: the file to write.
        show: called with each step, in words, before it begins.

    Raises:
        UserError: the file can't be written; as :func:`onnx_bytes`.
    """
    path = check_target(path)  # before a minute of work
    write_bytes(path, onnx_bytes(fast, show))


def check_target(path: str | os.PathLike[str]) -> Path:
    """The path of a file to write.

    Raises:
        UserError: it is a folder, or in none.
    """
    path = as_path(path, "path")
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"cannot write '{path}': give the name of a file in a folder that exists")
    return path


def onnx_bytes(fast: CompressedViT, show: Show = lambda step: None) -> bytes:
    """The content of the file that :func:`export_onnx` writes, which was run and compared.

    Raises:
        UserError: a package is missing (``pip install tokenenv[export]``), the model is not in
            float32, torch can't export something that the policy does, or the file doesn't give the
            model's logits.
    """
    return with_description(fast, graph_bytes(fast, show))


def graph_bytes(fast: CompressedViT, show: Show = lambda step: None) -> bytes:
    """:func:`onnx_bytes` without the description; errors as there."""
    check_export()
    if fast.backbone.dtype != torch.float32:
        dtype = str(fast.backbone.dtype).removeprefix("torch.")
        raise UserError(f"the export writes float32 only, not {dtype}: give it model.float()")
    batched = takes_batches(fast)
    fast = copy.deepcopy(fast).cpu().eval()
    if batched and fast.execution != "masked":
        fast.execution = "padded"  # torch.export can't follow the host's choice of groups
    try:
        content = _exported(_whole_pass(fast), fast.backbone.image_shape, batched, show)
    except Exception as error:  # torch raises many kinds for what it can't trace or translate
        check_interrupt(error)
        kind = type(fast.policy).__name__
        raise UserError(
            f"torch can't export a policy of class {kind} ({_cause(error)}): take another policy, "
            "or try execution='masked', which fixes the shapes and saves nothing"
        ) from error
    show("comparing its logits")
    _check_same(fast, OnnxModel(content, batched=batched))
    return content


def _whole_pass(fast: CompressedViT) -> nn.Module:
    """The module to export: the model, behind a smaller image if its method makes one."""
    image = torch.zeros((1, *fast.backbone.image_shape))
    with torch.no_grad():
        small, _ = fast.policy.reduction.resize(fast.backbone, image)
    return fast if small is fast.backbone else _Shrunk(fast, small.model)


class _Shrunk(nn.Module):
    """A smaller image, and the model for it, whose weights torch.export then finds."""

    def __init__(self, fast: CompressedViT, small: nn.Module) -> None:
        super().__init__()
        self.model = CompressedViT(small, fast.policy, fast.execution)
        self.__dict__["whole"] = fast.backbone  # not registered: its weights are not exported

    def forward(self, x: Tensor) -> Tensor:
        _, x = self.model.policy.reduction.resize(self.whole, x)
        return self.model(x)


def with_description(fast: CompressedViT, content: bytes) -> bytes:
    """A file of :func:`graph_bytes` that says what it holds, with the dense model's weights."""
    said = {
        "model": fast.backbone.architecture,
        "options": fast.backbone.family.options(),
        "batched": takes_batches(fast),
        **fast.description(),
    }
    return described(content, said, fast.model.state_dict())


def dense_onnx(model: nn.Module) -> OnnxModel:
    """A timm model with all its tokens in ONNX Runtime, for batches of any size.

    Raises:
        UserError: a package is missing, or torch can't export it.
    """
    check_export()
    model = copy.deepcopy(model).float().cpu().eval()
    for module in model.modules():
        if getattr(module, "fused_attn", False):  # whose ONNX form has more operations
            module.fused_attn = False  # type: ignore[assignment]
    try:
        shape = (model.in_chans, *model.patch_embed.img_size)  # type: ignore[union-attr, misc]
        content = _exported(model, shape, True, lambda step: None)
    except Exception as error:  # as in graph_bytes
        check_interrupt(error)
        raise UserError(
            f"torch can't export the dense model ({_cause(error)}): leave ONNX out"
        ) from error
    return OnnxModel(content, batched=True)


_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def _cause(error: Exception) -> str:
    """Why torch can't export something: the first cause, in one line without colours."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    words = " ".join(_ESCAPES.sub("", str(error)).split())
    return f"{type(error).__name__}: {words[:200]}" if words else type(error).__name__


def _exported(model: nn.Module, shape: tuple[int, ...], batched: bool, show: Show) -> bytes:
    """A model of images of ``shape (C, H, W)`` as ONNX, for batches or for a single image."""
    images = torch.zeros((3 if batched else 1, *shape))
    batch = torch.export.Dim("batch", min=1, max=_LARGEST_BATCH)
    show("tracing the model")
    with _quiet():
        graph = torch.export.export(
            model, (images,), strict=False, dynamic_shapes=({0: batch},) if batched else None
        )
    show("translating it to ONNX")
    with _quiet():
        program = torch.onnx.export(
            graph,
            input_names=["images"],
            output_names=["logits"],
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
            custom_translation_table={torch.ops.aten.sort.stable: _stable_sort()},
        )
    assert program is not None
    with tempfile.TemporaryDirectory() as place:
        complete = Path(place, "model.onnx")
        program.save(complete, external_data=False)
        return complete.read_bytes()


def _check_same(fast: CompressedViT, found: OnnxModel) -> None:
    """Check that a file gives the model's logits, unless the policy is random."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((4, *fast.backbone.image_shape), generator=generator)
    with torch.no_grad():
        expected, again = fast(images), fast(images)
    if not torch.equal(expected, again):
        return
    apart = _apart(expected, found(images))
    if not apart <= MOST_APART:
        raise UserError(
            f"the ONNX file gives logits that differ by {apart:.2g} from the model's (at most "
            f"{MOST_APART:g} is accepted): take another policy, or other versions of torch and "
            "onnxruntime"
        )


def _apart(expected: Tensor, found: Tensor) -> float:
    """Largest difference, relative to the largest logit where that is above 1."""
    return ((expected - found).abs().max() / expected.abs().max().clamp(min=1)).item()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No gradient, and none of torch's and onnxscript's own words, which a user can't act on."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "torch")]
    before = [logger.level for logger in loggers]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        # Of what it can't trace torch prints the whole graph.
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)


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
