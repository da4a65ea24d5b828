"""Load a backbone by a model's name and a weights file, with one clear error for each mistake."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenenv.errors import UserError
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.families import family_of

EMBEDDED = "digits_vit"
DIGITS_MODELS = (EMBEDDED, "digits_vit_16")
"""Names of the models whose weights come with the package."""

DTYPES = ("float32", "bfloat16", "float16")
"""Precisions of a backbone."""

_PROVEN: set[str] = set()
"""Names of models whose stages gave their own logits in this process."""

RANDOM = "random"
"""Given instead of a weights file: an untrained model."""


def load_backbone(
    name: str = EMBEDDED,
    weights: str | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
) -> Backbone:
    """A frozen backbone.

    Args:
        name: any timm model name of a family in :mod:`tokenenv.vit.families`, or ``digits_vit``,
            the embedded model.
        weights: a ``.safetensors`` or ``.pth`` state dict. The number of classes is read from
            it. ``random``: :func:`untrained_model`. None: the packaged weights of ``digits_vit``,
            and for any other model those that timm publishes (downloaded by timm).
        device: where to put the model.
        dtype: its precision, one of :data:`DTYPES`; policies always compute in float32.

    Raises:
        UserError: unknown or unsupported model, missing or mismatching weights, unknown device or
            dtype.
    """
    place, precision = check_device(device), check_dtype(dtype)
    # Of a named model only the weights differ from one time to the next.
    backbone = Backbone(load_model(name, weights), proven=name in _PROVEN).to(place, precision)
    _PROVEN.add(name)
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
    from tokenenv.vit.multiscale import STATE_PREFIX, add_scale

    if weights is None:
        return _pretrained(timm, name)
    state = read_weights(Path(weights))
    head = state.get(f"{_classifier(timm, name)}.weight")
    classes = {"num_classes": len(head)} if head is not None else {}
    model = create_model(name, classes | (options or {}))
    if any(key.startswith(STATE_PREFIX) for key in state):
        add_scale(model)
    missing, unexpected = [], []
    try:
        result = model.load_state_dict(state, strict=False)
        missing, unexpected = list(result.missing_keys), list(result.unexpected_keys)
    except RuntimeError as error:
        problem = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"weights '{weights}' don't fit model '{name}': {problem}") from None
    if missing or unexpected:
        what = f"'{missing[0]}' is missing" if missing else f"'{unexpected[0]}' is not in the model"
        raise UserError(
            f"weights '{weights}' don't fit model '{name}': {what} "
            f"({len(missing)} missing, {len(unexpected)} unexpected): give the matching --model"
        )
    return model.eval()


def create_model(name: str, options: dict[str, Any]) -> nn.Module:
    """A timm model without weights.

    Args:
        name: its name in timm.
        options: arguments of the model itself, as a file of a saved model has them.

    Raises:
        UserError: an option is one by which timm would read further files, such as
            ``checkpoint_path``.
    """
    timm = import_timm()
    own = inspect.signature(timm.create_model).parameters.values()
    reserved = [each.name for each in own if each.kind is not each.VAR_KEYWORD]
    for option in options:
        if option in reserved:
            raise UserError(f"option '{option}' is none of a saved model's: remove it")
    return timm.create_model(name, **options)


def untrained_model(name: str) -> nn.Module:
    """A timm model in eval mode with random weights from a fixed seed."""
    timm = import_timm()
    import tokenenv.vit.digits  # noqa: F401  (registers digits_vit with timm)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model(name).eval()


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
    import tokenenv.vit.digits  # noqa: F401  (registers digits_vit with timm)

    base = name.split(".")[0]
    if not timm.is_model(base):
        near = difflib.get_close_matches(base, timm.list_models(), n=1)
        hint = f"did you mean '{near[0]}'?" if near else "see timm.list_models('*vit*')"
        raise UserError(f"unknown model '{name}': {hint}")
    if name != base and name not in (known := timm.list_pretrained(f"{base}.*")):
        raise UserError(f"unknown model '{name}': choose from {', '.join([base, *known])}")
    # On the meta device no weights are allocated. If timm can't do that, loading checks it later.
    with contextlib.suppress(RuntimeError), torch.device("meta"):
        check(timm.create_model(base))


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
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(
            f"no pretrained weights for model '{name}' could be loaded ({reason}): "
            "give --weights FILE, or check the network"
        ) from None
    finally:
        logging.disable(disabled)


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from a ``.safetensors`` or ``.pth`` file; code in it is not executed.

    Raises:
        UserError: the file does not exist, or it is not a state dict.
    """
    if not path.is_file():
        raise UserError(f"weights file '{path}' does not exist: check --weights")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with warnings.catch_warnings():  # the error below replaces them
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"weights file '{path}' cannot be read ({type(error).__name__}): "
            "give a .safetensors or a .pth state dict"
        ) from None
    for key in ("state_dict", "model"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"weights file '{path}' holds no state dict of tensors")
    return state


def check_device(device: str | torch.device) -> torch.device:
    """The device.

    Raises:
        UserError: this machine does not have it.
    """
    try:
        place = torch.device(device)
        torch.empty(0, device=place).cpu()  # fails on 'meta', which holds no data
    except (RuntimeError, AssertionError, NotImplementedError):
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
