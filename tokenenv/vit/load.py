"""Load a backbone by a model's name and a weights file, with one clear error for each mistake."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokenenv.errors import UserError, check_interrupt, did_you_mean
from tokenenv.paths import as_path
from tokenenv.storage import check_values
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.checkpoint import read_weights, without_prefixes
from tokenenv.vit.families import family_of

EMBEDDED = "digits_vit"
DIGITS_MODELS = (EMBEDDED, "digits_vit_16")
SCENES_MODELS = ("scenes_vit", "scenes_vit_patch2")
EMBEDDED_MODELS = (*DIGITS_MODELS, *SCENES_MODELS)
"""Names of the models whose weights, and images, come with the package."""

DTYPES = ("float32", "bfloat16", "float16")
"""Precisions of a backbone."""

_PROVEN: set[tuple[Any, ...]] = set()
"""Names and shapes of models whose stages gave their own logits in this process."""

UNTRAINED_CLASSES = 1000
"""Classes of an untrained model whose namesake in timm has no classifier: ImageNet's number."""

_FINE_TUNED = (
    "give --weights FILE of one fine-tuned with a head, or --weights random to measure speed"
)

RANDOM = "random"
"""Given instead of a weights file: an untrained model."""


def load_backbone(
    name: str = EMBEDDED,
    weights: str | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    prepare: Callable[[nn.Module], object] | None = None,
) -> Backbone:
    """A frozen backbone.

    Args:
        name: any timm model name of a family in :mod:`tokenenv.vit.families`, or one of
            :data:`EMBEDDED_MODELS`.
        weights: a ``.safetensors`` or ``.pth`` state dict or training checkpoint, see
            :func:`~tokenenv.vit.checkpoint.read_weights`. The number of classes and the size of
            the images are read from its tensors. ``random``: :func:`untrained_model`. None: the
            packaged weights of an embedded model, and for any other model those that timm publishes
            (downloaded by timm).
        device: where to put the model.
        dtype: its precision, one of :data:`DTYPES`; policies always compute in float32.
        prepare: changes the loaded model, such as the size of its images.

    Raises:
        UserError: unknown or unsupported model, missing or mismatching weights, unknown device or
            dtype.
    """
    place, precision = check_device(device), check_dtype(dtype)
    model = load_model(name, weights)
    if prepare is not None:
        prepare(model)
    # Two models of one name and with tensors of the same shapes differ in their weights only.
    kind = (name, *((key, tensor.shape) for key, tensor in model.state_dict().items()))
    backbone = Backbone(model, proven=kind in _PROVEN).to(place, precision)
    _PROVEN.add(kind)
    return backbone


def load_model(
    name: str,
    weights: str | None = None,
    options: dict[str, Any] | None = None,
    check: Callable[[nn.Module], object] = family_of,
) -> nn.Module:
    """The timm model of :func:`load_backbone`, in eval mode.

    Args:
        name: as for :func:`load_backbone`.
        weights: as for :func:`load_backbone`.
        options: further arguments of ``timm.create_model``; only used with a weights file.
        check: as for :func:`check_name`.

    Raises:
        UserError: as for :func:`load_backbone`.
    """
    check_name(name, check)
    if weights == RANDOM:
        return untrained_model(name)
    timm = import_timm()
    if weights is None:
        if _classes(timm, name) == 0:
            raise UserError(f"{_headless(name)}: {_FINE_TUNED}")
        return _pretrained(timm, name)
    from tokenenv.vit.multiscale import STATE_PREFIX, add_scale

    state = without_prefixes(read_weights(as_path(weights, "weights")), weights)
    shape = _shape(timm, name, weights, state)
    model = create_model(name, shape | (options or {}))
    if any(key.startswith(STATE_PREFIX) for key in state):
        add_scale(model)
    _fill(model, state, name, weights)
    return model.eval()


def _shape(timm, name: str, weights: str, state: dict[str, Tensor]) -> dict[str, Any]:  # type: ignore[no-untyped-def]
    """What the tensors tell of the model: ``num_classes``, and ``img_size`` if it is another."""
    shape: dict[str, Any] = {}
    head = state.get(f"{_classifier(timm, name)}.weight")
    if head is not None and head.ndim:
        shape["num_classes"] = len(head)
    elif _classes(timm, name) == 0:
        raise UserError(
            f"{_headless(name)} and weights '{weights}' hold none ('{_classifier(timm, name)}."
            f"weight' is missing): {_FINE_TUNED}"
        )
    side = None if name in EMBEDDED_MODELS else _side(timm, name, state.get("pos_embed"))
    if side is not None:
        print(f"weights '{weights}' are for images of {side}x{side}, and so is '{name}' now")
        shape["img_size"] = side
    return shape


def _side(timm, name: str, positions: Tensor | None) -> int | None:  # type: ignore[no-untyped-def]
    """The side, pixels, of the square images that position embeddings are for.

    None: it is the model's own, or they tell none.
    """
    if positions is None or positions.ndim != 3:
        return None
    with torch.device("meta"):
        model = timm.create_model(name)
    own, embed = getattr(model, "pos_embed", None), getattr(model, "patch_embed", None)
    if own is None or embed is None or own.ndim != 3:
        return None
    patches = positions.shape[1] - own.shape[1] + embed.num_patches
    rows, (height, width) = math.isqrt(max(patches, 0)), embed.patch_size
    if patches == embed.num_patches or rows == 0 or rows**2 != patches or height != width:
        return None
    return rows * height


def _fill(model: nn.Module, state: dict[str, Tensor], name: str, weights: str) -> None:
    """Load ``state`` into ``model``.

    Raises:
        UserError: a tensor is missing, not in the model, of another shape or kind, or not finite.
    """
    try:
        check_values(state, model.state_dict(), f"weights '{weights}'", "give other --weights")
        result = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        problem = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"weights '{weights}' don't fit model '{name}': {problem}") from None
    missing, unexpected = list(result.missing_keys), list(result.unexpected_keys)
    if missing or unexpected:
        what = f"'{missing[0]}' is missing" if missing else f"'{unexpected[0]}' is not in the model"
        raise UserError(
            f"weights '{weights}' don't fit model '{name}': {what} "
            f"({len(missing)} missing, {len(unexpected)} unexpected): give the matching --model"
        )


def create_model(name: str, options: dict[str, Any]) -> nn.Module:
    """A timm model without weights.

    Args:
        name: its name in timm.
        options: arguments of the model itself. Those of a file were checked before: timm takes some
            by which it reads further files, such as ``checkpoint_path``.
    """
    return import_timm().create_model(name, **options)


def untrained_model(name: str) -> nn.Module:
    """A timm model in eval mode with random weights from a fixed seed.

    Where timm's has no classifier, it gets one of :data:`UNTRAINED_CLASSES`.
    """
    timm = import_timm()
    _register_embedded()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model(name, **_with_head(timm, name)).eval()


def check_name(name: str, check: Callable[[nn.Module], object] = family_of) -> None:
    """Refuse a model by its name, before any weights are downloaded or read.

    Args:
        name: its name in timm.
        check: raises for a model that is not accepted; by default one that no registered family
            accepts.

    Raises:
        UserError: timm has no such model, or ``check`` refuses it.
    """
    timm = import_timm()
    _register_embedded()
    base = name.split(".")[0]
    if not timm.is_model(base):
        raise UserError(
            f"unknown model '{name:.80}': timm.list_models('*vit*') lists timm's"
            f"{did_you_mean(base, timm.list_models())}"
        )
    if name != base and name not in (known := timm.list_pretrained(f"{base}.*")):
        raise UserError(f"unknown model '{name:.80}': choose from {', '.join([base, *known])}")
    # On the meta device no weights are allocated. If timm can't do that, loading checks it later.
    with contextlib.suppress(RuntimeError), torch.device("meta"):
        check(timm.create_model(base, **_with_head(timm, base)))


def _register_embedded() -> None:
    """Make timm know the models of :data:`EMBEDDED_MODELS`."""
    import tokenenv.vit.digits
    import tokenenv.vit.scenes  # noqa: F401


def _classes(timm, name: str) -> int | None:  # type: ignore[no-untyped-def]
    """Number of classes of timm's weights for the model; 0: they have no classifier."""
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return config.num_classes if config else None


def _with_head(timm, name: str) -> dict[str, int]:  # type: ignore[no-untyped-def]
    """Arguments that give a model a classifier if it has none."""
    return {"num_classes": UNTRAINED_CLASSES} if _classes(timm, name) == 0 else {}


def _headless(name: str) -> str:
    return f"timm's '{name}' has no classifier"


def _classifier(timm, name: str) -> str:  # type: ignore[no-untyped-def]
    """The name of the classifier layer, from timm's configuration of the model."""
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    found = (config.classifier if config else None) or "head"
    return found if isinstance(found, str) else found[0]


def _pretrained(timm, name: str) -> nn.Module:  # type: ignore[no-untyped-def]
    disabled = logging.root.manager.disable
    try:
        # Silences timm's warnings of every retry of a download; the error below replaces them.
        logging.disable(max(disabled, logging.WARNING))
        return timm.create_model(name, pretrained=True).eval()
    except Exception as error:
        check_interrupt(error)
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(
            f"no pretrained weights for model '{name}' could be loaded ({reason}): "
            "give --weights FILE, or check the network"
        ) from None
    finally:
        logging.disable(disabled)


def check_device(device: str | torch.device) -> torch.device:
    """The device.

    Raises:
        UserError: this machine does not have it.
    """
    try:
        place = torch.device(device)
        torch.empty(0, device=place).cpu()  # fails on 'meta', which holds no data
    except (RuntimeError, AssertionError, NotImplementedError, TypeError):
        raise UserError(
            f"device '{device}' is not available on this machine: use --device cpu"
        ) from None
    return place


def check_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The torch type of a name in :data:`DTYPES`.

    Raises:
        UserError: the name is not one of them.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise UserError(f"dtype '{name}': choose from {', '.join(DTYPES)}")
    found: torch.dtype = getattr(torch, name)
    return found


def import_timm():  # type: ignore[no-untyped-def]
    """Import timm.

    Raises:
        UserError: torch and torchvision are of different builds.
    """
    try:
        import timm
    except RuntimeError as error:
        if "torchvision::nms" in str(error):
            raise UserError(
                "torch and torchvision come from different builds (torchvision::nms does not "
                "exist): install both from the same index, pip install torch torchvision"
            ) from None
        raise
    return timm
