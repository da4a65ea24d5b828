"""A model and a method compressed into one faster model."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenenv.api.opening import open_candidates
from tokenenv.api.what import NamedMethod, NamedWord, method_of, name_what, no_method
from tokenenv.data import ImageSource, Preprocessing, open_source
from tokenenv.data.labels import name_outputs
from tokenenv.deploy.compressed import CompressedViT, load_compressed
from tokenenv.deploy.compressed import compress as compress_model
from tokenenv.errors import UserError, check_keywords
from tokenenv.game.cost import Cost
from tokenenv.game.episode import Execution
from tokenenv.game.policy import play
from tokenenv.machine import describe_machine
from tokenenv.measure.candidate import MethodCandidate
from tokenenv.measure.evaluation import Evaluation
from tokenenv.measure.opening import images_to_time, named_model, text
from tokenenv.measure.printing import evaluation_bar
from tokenenv.measure.speed import Speed, bench, pool_size
from tokenenv.paths import as_path
from tokenenv.vit.families import family_of


def measure(
    fast: CompressedViT,
    data: str | os.PathLike[str] | None = None,
    *,
    limit: int | None = None,
    batches: Sequence[int] = (1, 8),
) -> Measured:
    """Measure a compressed model beside the dense one; ``fast.measured`` then holds the numbers.

    Speed is that of few rounds; ``tokenenv bench`` measures it longer. Without ``data`` it sees
    the images of an embedded model, else random ones, on which a method may decide unlike on real
    ones. A model without class names gets those of the data set's classes, if there is a class for
    each output.

    Args:
        fast: the model.
        data: labelled images, see :func:`tokenenv.evaluate`; None: accuracy is not measured.
        limit: largest number of images; None: all.
        batches: batch sizes.

    Raises:
        UserError: no image can be read, or the data set's classes don't fit the model.
    """
    backbone = fast.backbone
    candidate = MethodCandidate(fast.method or "compressed", fast.policy, backbone)
    size = pool_size(max(batches))
    if data is None:
        images, origin = images_to_time(backbone, backbone.architecture, None, size)
        found, numbers = None, counted(fast, images)
    else:
        source = open_source(text(data, "data"), backbone.model, split="test", limit=limit)
        _name_classes(fast, source)
        with evaluation_bar(source) as progress:
            found = candidate.evaluate(backbone, source, progress=progress)
        images = source.batch(found.index[:size]).images.to(backbone.device, backbone.dtype)
        report, origin = found.report(), f"{len(found.labels)} images of {source.name}"
        names = ("images", "top1", "top1_dense", "agreement", "gmacs", "gmacs_dense", "tokens")
        change = found.change()
        numbers = {name: report[name] for name in names} | {
            "top1_change": change.mean,
            "top1_change_95": [change.low, change.high],
        }
    rows = [
        bench(backbone, [candidate], images, batch=batch, rounds=3, execution=fast.execution)[1]
        for batch in batches
    ]
    kept = ("batch", "images_per_s", "speedup", "speedup_q25", "speedup_q75")
    speeds = [{name: row.to_dict()[name] for name in kept} for row in rows]
    where = {"data": origin, "machine": describe_machine(backbone.device), "speed": speeds}
    fast.measured = numbers | where
    return Measured(rows, found)


class Measured(NamedTuple):
    """What :func:`measure` found.

    Attributes:
        speeds: a row per batch size.
        evaluation: on the data, or None.
    """

    speeds: list[Speed]
    evaluation: Evaluation | None


@torch.inference_mode()
def counted(fast: CompressedViT, images: Tensor) -> dict[str, Any]:
    """Multiply-adds and tokens of images, means."""
    backbone, policy = fast.backbone, copy.deepcopy(fast.policy)
    episode, cost = play(backbone, policy, images, fast.execution), Cost(backbone)
    tokens = torch.stack(episode.fed, 1).double().mean(0) - backbone.prefix
    return {
        "gmacs": cost.of(episode, policy).mean().item() / 1e9,
        "gmacs_dense": cost.dense() / 1e9,
        "tokens": [round(count, 2) for count in tokens.tolist()],
    }


def _name_classes(fast: CompressedViT, source: ImageSource) -> None:
    if fast.classes is None and len(source.names) == fast.num_classes:
        name_outputs(fast.model, [source.names[output] for output in range(fast.num_classes)])


def read_class_names(path: str | os.PathLike[str]) -> list[str]:
    """The names of classes in a text file, one a line, in the order of the outputs.

    Raises:
        UserError: the file can't be read.
    """
    file = as_path(path, "classes")
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read classes '{file}' ({type(error).__name__}): give a text file, a name a "
            "line in the order of the outputs"
        ) from None
    return [name for name in names if name]


def check_saved(fast: CompressedViT, folder: str | os.PathLike[str]) -> None:
    """Load a saved model and compare its logits with those of the model in memory.

    Raises:
        UserError: they differ.
    """
    images, _ = images_to_time(fast.backbone, fast.backbone.architecture, None, 4)
    if not as_loaded(fast, folder, images):
        raise UserError(f"'{folder}' gives other logits than the model that was saved: remove it")


@torch.inference_mode()
def as_loaded(fast: CompressedViT, folder: str | os.PathLike[str], images: Tensor) -> bool:
    """Whether the model saved in a folder gives the logits of ``fast``, unless these are random.

    ``images``: ``(B, C, H, W)`` of the model's device and type.
    """
    twin = copy.deepcopy(fast)
    again = load_compressed(as_path(folder, "folder"), fast.backbone.device, trust=True)
    first = twin(images)
    drawn = not torch.equal(first, twin(images))
    return drawn or torch.allclose(first, again(images), atol=1e-3, rtol=1e-2)


@check_keywords
def compress(
    model: nn.Module | str | None,
    what: Any,
    execution: Execution | None = None,
    *,
    weights: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    preprocessing: Preprocessing | None = None,
    classes: str | os.PathLike[str] | Sequence[str] | None = None,
    trust: bool = False,
) -> CompressedViT:
    """Make a model and a method one module that computes only the tokens the method keeps.

    Args:
        model: a timm model that :class:`~tokenenv.Backbone` takes, which is copied and not changed;
            or its name; None: the model ``what`` was trained on, else ``digits_vit``.
        what: the method, as :func:`tokenenv.evaluate` takes it; copied.
        execution: how images of different lengths share a batch, see
            :class:`~tokenenv.game.episode.Episode`; None: the device's default.
        weights: of a model given by name, see :func:`tokenenv.evaluate`.
        device: of a model given by name, see :func:`tokenenv.evaluate`.
        dtype: of a model given by name, see :func:`tokenenv.evaluate`.
        preprocessing: of a model given by name, see :func:`tokenenv.evaluate`; kept in the folder
            that is saved.
        classes: names of the classes in the order of the model's outputs, or a text file with one a
            line; None: the model's own, or ImageNet's.
        trust: whether to run third-party code that a saved method names, see :func:`agents.load`.

    Returns:
        The module, in ``eval`` mode.

    Raises:
        UserError: a model that is compressed already or not supported, a method for another model,
            an unknown execution, class names that don't fit.
    """
    fast = _compressed(model, what, execution, weights, device, dtype, preprocessing, trust)
    fast.method = what if isinstance(what, str) else ""
    if classes is not None:
        if isinstance(classes, str | os.PathLike):
            classes = read_class_names(classes)
        name_outputs(fast.model, list(classes))
    return fast


def _compressed(
    model: nn.Module | str | None,
    what: Any,
    execution: Execution | None,
    weights: str | os.PathLike[str] | None,
    device: str,
    dtype: str,
    preprocessing: Preprocessing | None,
    trust: bool,
) -> CompressedViT:
    if isinstance(model, CompressedViT):
        raise UserError("the model is compressed already: compress the timm model it was made of")
    if isinstance(model, nn.Module):
        return compress_model(
            model, method_of(what, len(family_of(model).blocks), trust), execution
        )
    named = name_what(what, trust)
    if not isinstance(named, NamedWord | NamedMethod):
        raise UserError(no_method(named))
    opened = open_candidates(
        [what], named_model(model, weights, device, dtype, preprocessing), images=False, trust=trust
    )
    (candidate,) = opened.candidates
    assert isinstance(candidate, MethodCandidate)
    return compress_model(candidate.backbone.model, candidate.method, execution)
