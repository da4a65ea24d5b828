"""``tokenenv evaluate``: a policy against the dense model, image by image."""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path
from typing import Any

from torch import nn

from agents.policy import SHIPPED, Policy, shipped
from agents.spec import HEURISTICS, parse_policy, split_name
from agents.storage import read_tensors, write_json
from tokenenv import metrics
from tokenenv.backbone import Backbone
from tokenenv.commands.common import (
    evaluate_with_bar,
    evaluation_json,
    open_backbone,
    print_result,
    report_skipped,
    writable_folder,
)
from tokenenv.compressed import CONFIG, WEIGHTS
from tokenenv.data import ImageSource, open_source
from tokenenv.errors import UserError


def evaluate(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    with writable_file(args.json):  # before minutes of work
        if args.model is None:
            trained = trained_on(args.what)
            args.model = trained.get("model")
            args.weights = args.weights or trained.get("weights")
        backbone, name = open_backbone(args)
        policy = parse_policy(args.what, backbone.depth)
        fit(policy, backbone, name)
        source = open_source(args.data, backbone.model, split="test", limit=args.limit)
        print(f"evaluating {args.what} on {name}: {len(source)} images of {source.name}")
        result = evaluate_with_bar(
            backbone, policy, source, batch_size=args.batch, restrict=args.restrict
        )
        report_skipped(source)
        print_result(source, result)
        if args.json:
            report = evaluation_json(name, source, result)
            write_json(Path(args.json), {**report, "predictions": _predictions(source, result)})
            print(f"every prediction is in {args.json}")
    return 0


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


def trained_on(what: str) -> dict[str, Any]:
    """Model and weights of a run folder or a shipped policy; empty for a heuristic."""
    folder = folder_of(what)
    if folder is None:
        return {}
    config, policy = folder / "config.json", folder / "policy.safetensors"
    if (folder / CONFIG).is_file():
        compressed = json.loads((folder / CONFIG).read_text())
        return {"model": compressed.get("model"), "weights": str(folder / WEIGHTS)}
    if not config.is_file():
        return {"model": read_tensors(policy)[1].get("trained_on")}
    try:
        found = json.loads(config.read_text())
        return {"model": found["model"], "weights": found["weights"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"'{config}' doesn't say model and weights ({type(error).__name__}): "
            "restore it, or give --model and --weights"
        ) from None


def folder_of(what: str) -> Path | None:
    """Where a run or a shipped policy is kept; None for anything else."""
    name = split_name(what)[0]
    folder = SHIPPED / name if name in shipped() else Path(name)
    kept = name not in HEURISTICS and (folder / "policy.safetensors").is_file()
    return folder if kept else None


def fit(policy: Policy, backbone: Backbone, name: str) -> None:
    """Check that the policy belongs to this model, and bring it to its device.

    Raises:
        UserError: it was trained for another one, or its rules don't fit.
    """
    metrics.check_fit(policy, backbone, name)
    if isinstance(policy, nn.Module):
        policy.to(backbone.device)


def _predictions(source: ImageSource, result: metrics.Evaluation) -> list[dict[str, Any]]:
    columns = (result.index, result.labels, result.dense, result.reduced)
    return [
        {"file": source.files[index], "label": label, "dense": dense, "reduced": reduced}
        for index, label, dense, reduced in zip(*(c.tolist() for c in columns), strict=True)
    ]
