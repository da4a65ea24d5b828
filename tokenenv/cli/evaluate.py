"""``tokenenv evaluate``: a policy against the dense model, image by image."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from agents.policies import POLICY, SHIPPED, shipped
from agents.policies.words import parse_policy, split_name, usages
from agents.training.run import MODEL
from tokenenv.cli.common import open_backbone, open_dense, precision
from tokenenv.cli.merged import is_merged, open_merged
from tokenenv.data import ImageSource, open_source
from tokenenv.deploy.compressed import CONFIG, WEIGHTS
from tokenenv.errors import UserError
from tokenenv.game.policy import Method
from tokenenv.measure import evaluation as metrics
from tokenenv.measure.printing import (
    evaluate_with_bar,
    evaluation_bar,
    evaluation_json,
    parameters_json,
    print_parameters,
    print_result,
    report_skipped,
)
from tokenenv.storage import read_tensors, writable_folder, write_json
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.load import load_backbone


def evaluate(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    with writable_file(args.json):  # before minutes of work
        more: dict[str, int] = {}
        if is_merged(args.what):
            name, source, result, more = _merged(args)
            frozen = False
        else:
            name, source, result, frozen = _played(args)
        report_skipped(source)
        print_result(source, result, frozen)
        if more:
            print_parameters(more)
        if args.json:
            report = {**evaluation_json(name, source, result), "dtype": args.dtype, **more}
            if not frozen:
                report["frozen"] = False
            write_json(Path(args.json), {**report, "predictions": _predictions(source, result)})
            print(f"every prediction is in {args.json}")
    return 0


def _played(
    args: argparse.Namespace,
) -> tuple[str, ImageSource, metrics.Evaluation, bool]:
    """Of a policy: the model's name, the images, the result, whether the backbone is frozen."""
    run = adopt(args, args.what)
    backbone, name = open_backbone(args)
    reference = _untouched(run, args)
    policy = parse_policy(args.what, backbone.depth)
    fit(policy, backbone, name)
    source = _images(args, backbone.model, name)
    result = evaluate_with_bar(
        backbone,
        policy,
        source,
        batch_size=args.batch,
        restrict=args.restrict,
        reference=reference,
    )
    return name, source, result, "original" not in run


def _merged(
    args: argparse.Namespace,
) -> tuple[str, ImageSource, metrics.Evaluation, dict[str, int]]:
    """Of a model with LTM blocks: its timm model's name, images, the result, parameters."""
    model = open_merged(args, [args.what])[args.what]
    dense, name = open_dense(args)
    source = _images(args, dense.model, name)
    with evaluation_bar(source) as progress:
        result = metrics.evaluate_model(
            model,
            dense,
            source,
            lengths=model.lengths,
            batch_size=args.batch,
            restrict=args.restrict,
            progress=progress,
        )
    return name, source, result, parameters_json(model, dense)


def _images(args: argparse.Namespace, model: nn.Module, name: str) -> ImageSource:
    source = open_source(args.data, model, split="test", limit=args.limit)
    dtype = "" if args.dtype == "float32" else f" in {args.dtype}"
    print(f"evaluating {args.what} on {name}{dtype}: {len(source)} images of {source.name}")
    return source


@contextlib.contextmanager
def writable_file(path: str | None, option: str = "--json") -> Any:
    """See that the file which ``option`` names can be written.

    Raises:
        UserError: it cannot.
    """
    if path is None:
        yield
        return
    if Path(path).is_dir():
        raise UserError(f"{option} '{path}' is a folder: give the name of a file")
    with writable_folder(Path(path).parent):
        yield


def adopt(args: argparse.Namespace, *whats: str) -> dict[str, Any]:
    """Fill in ``--model`` and ``--weights`` where a run or a shipped policy knows them.

    A run that fine-tuned its backbone goes before one that did not, and brings its own weights:
    ``--weights`` are then those of the model that it started from.

    Returns:
        What :func:`trained_on` says of the one that was followed; empty if none was.

    Raises:
        UserError: two runs fine-tuned a backbone, each its own; or one did, of another ``--model``.
    """
    runs = [found for found in map(trained_on, whats) if found]
    tuned = {found["weights"]: found for found in runs if "original" in found}
    if len(tuned) > 1:
        raise UserError(
            f"{' and '.join(whats)}: each fine-tuned a backbone of its own, take one at a time"
        )
    if tuned:
        (known,) = tuned.values()
        check_same_model(whats, known, args.model)
        known["original"] = args.weights or known["original"]
        args.model, args.weights = known["model"], known["weights"]
        return known
    known = next(iter(runs), {})
    if args.model is None:
        args.model, args.weights = known.get("model"), args.weights or known.get("weights")
    return known


def check_same_model(whats: Sequence[str], known: dict[str, Any], model: str | None) -> None:
    """Check that ``--model``, if given, is what a run fine-tuned.

    Raises:
        UserError: it is another one.
    """
    if model is not None and model.split(".")[0] != known["model"].split(".")[0]:
        raise UserError(
            f"{' and '.join(whats)}: a {known['model']} was fine-tuned there, not a {model}: take "
            "that model"
        )


def trained_on(what: str) -> dict[str, Any]:
    """Model and weights of a run folder or a shipped policy; empty for a heuristic.

    ``weights`` are the run's own where it fine-tuned the backbone, and ``original``, which only
    then is there, those that it started from.

    Raises:
        UserError: the folder doesn't say, or its own weights are missing.
    """
    folder = folder_of(what)
    if folder is None:
        return {}
    config, policy = folder / "config.json", folder / POLICY
    if (folder / CONFIG).is_file():
        model, _ = _said_in(folder / CONFIG)
        return {"model": model, "weights": str(folder / WEIGHTS)}
    if not config.is_file():
        return {"model": read_tensors(policy)[1].get("trained_on")}
    model, weights = _said_in(config)
    own = folder / MODEL
    if own.is_file():
        return {"model": model, "weights": str(own), "original": weights}
    if _fine_tuned(folder):
        raise UserError(f"run '{folder}' was fine-tuned and '{own}' is missing: restore it")
    return {"model": model, "weights": weights}


def _fine_tuned(folder: Path) -> bool:
    """Whether a run says that it trained its backbone too; runs that say nothing did not."""
    for file in (folder / "config.json", folder / "report.json"):
        try:
            if json.loads(file.read_text()).get("frozen") is False:
                return True
        except (OSError, ValueError, AttributeError):  # not a run's
            continue
    return False


def _said_in(config: Path) -> tuple[str, str | None]:
    """Model and weights as the JSON file names them."""
    try:
        found = json.loads(config.read_text())
        model, weights = found["model"], found.get("weights")
        if not isinstance(model, str) or not isinstance(weights, str | None):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"'{config}' doesn't say model and weights ({type(error).__name__}): "
            "restore it, or give --model and --weights"
        ) from None
    return model, weights


def _untouched(run: dict[str, Any], args: argparse.Namespace) -> Backbone | None:
    """The model that a run fine-tuned, as it was before; None for a run that did not."""
    if "original" not in run:
        return None
    try:
        return load_backbone(run["model"], run["original"], args.device, precision(args))
    except UserError as error:
        print(f"the model before fine-tuning is out of reach ({error})")
        print("so 'dense' is the fine-tuned model of which no token leaves")
        return None


def folder_of(what: str) -> Path | None:
    """Where a run or a shipped policy is kept; None for anything else."""
    name = split_name(what)[0]
    folder = SHIPPED / name if name in shipped() else Path(name)
    kept = name not in usages() and (folder / POLICY).is_file()
    return folder if kept else None


def fit(policy: Method, backbone: Backbone, name: str) -> None:
    """Check that the policy belongs to this model, and bring it to its device.

    Raises:
        UserError: it was trained for another one, or its rules don't fit.
    """
    policy.check_fit(backbone, name)
    policy.on(backbone.device)


def _predictions(source: ImageSource, result: metrics.Evaluation) -> list[dict[str, Any]]:
    columns = (result.index, result.labels, result.dense, result.reduced)
    return [
        {"file": source.files[index], "label": label, "dense": dense, "reduced": reduced}
        for index, label, dense, reduced in zip(*(c.tolist() for c in columns), strict=True)
    ]
