"""Save and load models with LTM blocks: a folder with JSON and safetensors, never a pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch

from tokenenv.artefact import FAULTS, Unfit, Within, check_fields, read_object, reason_of
from tokenenv.data import Preprocessing
from tokenenv.errors import UserError
from tokenenv.ltm.block import MaskKind
from tokenenv.ltm.model import LTM, check_family, ltm
from tokenenv.paths import as_path
from tokenenv.storage import check_values, new_folder
from tokenenv.vit.checkpoint import read_weights
from tokenenv.vit.dense import evaluating
from tokenenv.vit.families.vision_transformer import VisionTransformerFamily, own_options
from tokenenv.vit.load import DTYPES, check_device, check_dtype, check_name, create_model
from tokenenv.vit.twin import differing_setting

CONFIG, WEIGHTS = "ltm.json", "model.safetensors"
"""What a folder of a saved model holds."""

_KINDS = {"model": str, "options": dict, "ltm": dict, "dtype": Literal[DTYPES]}
_SIZE = VisionTransformerFamily.OPTIONS["img_size"]
_OPTIONS = {"num_classes": Within(0, 10**6), **VisionTransformerFamily.OPTIONS}
_BLOCKS = {
    "ratio": Within(0.0, 1.0),
    "mask": MaskKind,
    "blocks": list[int] | None,
    "recursive": bool,
    "hard": bool,
    "image_size": _SIZE,
}
"""What :data:`CONFIG` holds: nothing else is passed on to timm, which could download it."""


def save_ltm(model: LTM, folder: str | Path) -> None:
    """Write a model's name, options and weights atomically; :func:`load_ltm` reads them.

    Args:
        model: a model with LTM blocks, made of a timm model that was created by name.
        folder: a new or an empty folder.

    Raises:
        UserError: the folder is not empty or can't be written, or timm can't rebuild the model
            from its name, classes, image size and pooling.
    """
    with new_folder(as_path(folder, "folder")) as complete:
        write_ltm(model, complete)
        _check_twin(model, complete)


def write_ltm(model: LTM, folder: Path) -> None:
    """:func:`save_ltm` without its checks, into a folder that may hold other files."""
    from safetensors.torch import save_file

    state = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    save_file(state, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(_describe(model), indent=2) + "\n")


def load_ltm(folder: str | Path, device: str | torch.device = "cpu") -> LTM:
    """The model that :func:`save_ltm` wrote, in eval mode.

    Raises:
        UserError: the folder does not exist or is not complete.
    """
    place, folder = check_device(device), as_path(folder, "folder")
    blame = f"'{folder}' holds no LTM model"
    remedy = "give a folder that save_ltm wrote"
    config = read_object(folder / CONFIG, _KINDS, remedy, blame)
    name, options, blocks = config["model"], config["options"], config["ltm"]
    try:
        check_fields(options, {key: _OPTIONS[key] for key in options.keys() & _OPTIONS}, True)
        check_fields(blocks, _BLOCKS, closed=True)
    except Unfit as error:
        raise UserError(f"{blame} ({CONFIG}: {error}): {remedy}") from None
    check_name(name, check_family)
    for given in (options, blocks):
        given |= {key: tuple(one) for key, one in given.items() if isinstance(one, list)}
    try:
        dense = create_model(name, options)
        if (said := config.get("preprocessing")) is not None:
            Preprocessing.from_json(said, folder / CONFIG).apply(dense)
        model = ltm(dense, **blocks)
        state = read_weights(folder / WEIGHTS)
        check_values(state, model.state_dict(), f"'{folder / WEIGHTS}'", "save the model anew")
        model.load_state_dict(state)
    except UserError:
        raise
    except FAULTS as error:
        raise UserError(f"'{folder}' does not fit model '{name}': {reason_of(error)}") from None
    return model.to(place, check_dtype(config["dtype"])).eval()


def _describe(model: LTM) -> dict[str, Any]:
    timm_model = model.model
    options = {"num_classes": timm_model.num_classes, "in_chans": model.channels}
    patches = getattr(timm_model, "patch_embed", None)
    if patches is not None:
        options["img_size"] = list(patches.img_size)
    if model.family == "ViT":
        options |= own_options(timm_model, timm_model.blocks.blocks[-1])
    if model.family == "Swin":
        rates = [getattr(module, "drop_prob", None) or 0.0 for module in timm_model.modules()]
        options["drop_path_rate"] = max(rates)
    return {
        "model": model.pretrained_cfg.get("architecture") or "",
        "options": options,
        "ltm": model.config,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "preprocessing": Preprocessing.of(timm_model).to_json(),
    }


@torch.no_grad()
def _check_twin(model: LTM, folder: Path) -> None:
    """Check that the model read back from ``folder`` gives the same logits."""
    config = _describe(model)
    words = (
        f"the model is not what timm makes of '{config['model']}', its classes, image size and "
        "pooling, and can't be read back: save its state_dict() and build it by your code"
    )
    weight = next(model.parameters())
    try:
        twin = load_ltm(folder, weight.device)
    except (UserError, RuntimeError) as error:
        raise UserError(f"{words} ({error})") from None
    shape = (1, config["options"]["in_chans"], *config["ltm"]["image_size"])
    image = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    image = image.to(weight.device, weight.dtype)
    with evaluating(model):
        same = torch.allclose(model(image), twin(image), rtol=1e-3, atol=1e-4)
    if not same:
        raise UserError(words)
    if reason := differing_setting(model, twin):
        raise UserError(f"{words} ({reason})")
