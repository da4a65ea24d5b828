"""A paper's protocol from training to its table, with the paper's own numbers beside ours."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from agents.training.pilot import Pilot, pilot
from agents.training.trainer import check_same
from tokenenv._version import __version__
from tokenenv.api.reproduce_model import Asked, OneModel
from tokenenv.artefact import read_object
from tokenenv.data import open_source
from tokenenv.errors import UserError, check_choice, check_keywords, why
from tokenenv.game.checks import check_whole
from tokenenv.machine import describe_machine
from tokenenv.measure.evaluation import dense_predictions
from tokenenv.measure.opening import Model, text
from tokenenv.page.data import page_of_comparison
from tokenenv.page.html import write_page
from tokenenv.papers import TIERS, Study, find_paper, folders
from tokenenv.papers.protocol import IMAGENET_A, IMAGENET_C
from tokenenv.papers.table import Reproduction, page_table
from tokenenv.paths import as_path
from tokenenv.storage import own_folder, write_bytes, write_json
from tokenenv.vit.load import EMBEDDED_MODELS, check_device, check_dtype

_TIMED = 256
"""Images on which the dense model's rate is measured."""
_STAND_IN = "evit:keep=0.7"
"""Whose decisions a backbone is fine-tuned under while only its time is measured."""
_TRIES = 8
"""Settings that a bisection tries."""
MOST_SEEDS = 100


@check_keywords
def reproduce(
    paper: str,
    *,
    out: str | os.PathLike[str],
    tier: str = "smoke",
    imagenet: str | os.PathLike[str] | None = None,
    imagenet_a: str | os.PathLike[str] | None = None,
    imagenet_c: str | os.PathLike[str] | None = None,
    models: Sequence[str] = (),
    weights: str | os.PathLike[str] | None = None,
    seeds: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> Reproduction:
    """Run a paper's protocol and write its table; as ``tokenenv reproduce``.

    The paper's method, its ablations and the baselines that are trained are trained once for each
    seed. The other baselines are set to the same accuracy, or to the same multiply-adds, by
    bisection of their knob on training images that were held back. All are evaluated on the same
    images and timed in turns. What fails is noted in the table, and the rest goes on. After Ctrl-C
    the same call goes on; it may then ask for more seeds, models and sets.

    Args:
        paper: ``rl4evit``, ``dora``, ``dora-prune``, ``ltm`` or ``mstm``.
        out: a folder for ``report.html``, ``table.md``, ``table.json``, and below it the runs and
            what was measured.
        tier: ``smoke``: minutes, on embedded images; ``small``: hours, on any folder of
            photographs; ``paper``: the paper's own size, on ImageNet-1K.
        imagenet: a folder with ``train`` and ``val``, each laid out as class/image.
        imagenet_a: ImageNet-A; predictions are among its classes.
        imagenet_c: ImageNet-C, laid out as corruption/severity/class/image.
        models: timm's names; empty: those of the tier.
        weights: a file, or a folder that holds ``MODEL.safetensors``; None: timm's.
        seeds: how many, from 0; None: those of the tier.
        device: where to train and to measure: ``cpu``, ``cuda`` ...
        dtype: precision of measuring; training has its own settings.

    Raises:
        UserError: an argument is wrong, or a folder is not laid out as it has to be.
        KeyboardInterrupt: after Ctrl-C; what is finished is kept.
    """
    asked = _asked(paper, tier, imagenet, imagenet_a, imagenet_c, seeds, as_path(out, "out"),
                   device, dtype)  # fmt: skip
    names = list(dict.fromkeys(models)) or list(asked.tier.models)
    for name in names:
        _check_images(name, asked.data)
    with own_folder(asked.out):
        _check_before(asked)
        start = time.monotonic()
        works = [OneModel(asked, name, _weights(weights, name)) for name in names]
        estimate = sum(_estimate(work) for work in works)
        print(f"about {tqdm.format_interval(estimate)} in all; Ctrl-C keeps what is finished")
        done = Reproduction(asked.paper, tier, [], describe_machine(torch.device(device)), estimate,
                            0.0)  # fmt: skip
        for work in works:
            _run(work)
            done = replace(
                done,
                tables=[*done.tables, *work.measure()],
                seconds=time.monotonic() - start,
            )
            _write(done, works)
    return done


def _check_images(model: str, data: str | None) -> None:
    """Raise :class:`UserError` unless the images are such as the model reads."""
    if model in EMBEDDED_MODELS and data is not None:
        raise UserError(f"model '{model}' reads embedded images: leave --imagenet out")
    if model not in EMBEDDED_MODELS and data is None:
        raise UserError(f"model '{model}' reads photographs: give --imagenet DIR")


def _run(work: OneModel) -> None:
    """Train the paper's method, match the baselines, train the rest."""
    first, *others = work.studies()
    work.train(first)
    work.match()
    for study in others:
        work.train(study)


def _asked(
    paper: str,
    tier: str,
    imagenet: Any,
    imagenet_a: Any,
    imagenet_c: Any,
    seeds: int | None,
    out: Path,
    device: str,
    dtype: str,
) -> Asked:
    """Check all arguments, and the folders' layout."""
    found = find_paper(paper)
    check_choice("tier", tier, TIERS)
    check_device(device)
    check_dtype(dtype)
    plan = found.tiers[tier]
    data = text(imagenet, "imagenet")
    if tier != "smoke" and data is None:
        raise UserError(f"tier {tier} needs --imagenet DIR: a folder with train and val")
    if data is not None:
        parts = folders.check_parts(data)
        if tier == "paper":
            folders.check_whole(data, parts)
        for part, counts in parts.items():
            print(f"{data}, {part}: {len(counts):,} classes, {sum(counts.values()):,} images")
    views: dict[str, dict[str, str]] = {}
    if (place := text(imagenet_a, "imagenet_a")) is not None:
        folders.check_adversarial(place)
        views[IMAGENET_A] = {"": place}
    if (place := text(imagenet_c, "imagenet_c")) is not None:
        views[IMAGENET_C] = folders.corrupted(place)
    count = plan.seeds if seeds is None else check_whole("seeds", seeds, 1, MOST_SEEDS + 1)
    return Asked(found, plan, tier, count, data, views, out, device, dtype)


def _check_before(asked: Asked) -> None:
    """Refuse a folder that holds the reproduction of something else."""
    path = asked.out / "protocol.json"
    now = {
        "tokenenv": __version__, "paper": asked.paper.name, "tier": asked.name, "data": asked.data,
        "dtype": asked.dtype,
    }  # fmt: skip
    if path.is_file():
        check_same(read_object(path, {}, "give another --out"), now, asked.out)
    write_json(path, now)


def _weights(weights: str | os.PathLike[str] | None, model: str) -> str | None:
    """The file of a model's weights; None: timm's.

    Raises:
        UserError: a folder has none.
    """
    given = text(weights, "weights")
    if given is None or not os.path.isdir(given):
        return given
    file = os.path.join(given, f"{model}.safetensors")
    if not os.path.isfile(file):
        raise UserError(f"'{given}' holds no {model}.safetensors: put the model's weights there")
    return file


# Time ---------------------------------------------------------------------------------------------
def _estimate(work: OneModel) -> float:
    """Seconds that one model will take, from measured rates, printed part by part."""
    asked = work.asked
    try:
        rate, images = _rate(work)
    except Exception as error:
        print(f"{work.name}: no estimate ({why(error)})")
        return 0.0
    training, words, pilots = 0.0, [], dict[str, Pilot]()
    for study in work.studies():
        missing = [seed for seed in work.seeds(study) if not work.finished(study, seed)]
        if not missing:
            continue
        key = study.system if study.part == "ablation" else study.name
        try:
            if key not in pilots:
                pilots[key] = _pilot(work, study)
        except Exception as error:
            print(f"  {study.name}: no estimate ({why(error)})")
            continue
        known = pilots.setdefault(study.system, pilots[key])
        training += known.took(rate) * len(missing)
        words.append(
            f"{study.name} {known.seconds:.2g} s x {known.updates} updates x {len(missing)}"
        )
    held = next((each.held_back for each in pilots.values()), 0)
    held = min(held, asked.tier.tries or held)
    matching = _TRIES * len(asked.paper.baselines) * held / rate
    rows = 2 * sum(len(work.seeds(study)) for study in work.studies()) + len(asked.paper.baselines)
    views = 1 + sum(len(places) for places in asked.views.values())
    measuring = (rows + 1) * images * views / rate
    timing = 2 * rows * (asked.tier.rounds + 1) * max(0.25, asked.tier.batch / rate)
    parts = {"training": training, "matching": matching, "evaluating": measuring, "timing": timing}
    told = ", ".join(f"{name} {tqdm.format_interval(value)}" for name, value in parts.items())
    print(
        f"{work.name}: {rate:.0f} images/s here; {told}"
        + (f" ({'; '.join(words)})" if words else "")
    )
    return sum(parts.values())


def _rate(work: OneModel) -> tuple[float, int]:
    """Images per second of the dense model here, and how many test images there are."""
    asked = work.asked
    opened = Model(work.name, work.weights, asked.device, asked.dtype).open_dense(asked.data)
    source = open_source(asked.data, opened.model, split="test", limit=asked.tier.limit)
    few = source.subset(_TIMED, 0)
    dense_predictions(opened, few.subset(8, 0))
    start = time.perf_counter()
    dense_predictions(opened, few)
    return len(few) / (time.perf_counter() - start), len(source)


def _pilot(work: OneModel, study: Study) -> Pilot:
    arguments = work.arguments(study)
    if study.under:
        arguments["policy"] = _STAND_IN
    return pilot(study.system, **arguments)


# Files --------------------------------------------------------------------------------------------
def _write(done: Reproduction, works: Sequence[OneModel]) -> None:
    """Write the tables and the page."""
    out = works[0].asked.out
    write_bytes(out / "table.md", done.as_markdown().encode())
    write_json(out / "table.json", done.to_dict())
    comparison = next((work.comparison for work in works if work.comparison), None)
    if comparison is not None:
        page = page_of_comparison(comparison)
        write_page(
            out / "report.html",
            page
            | {
                "title": done.paper.title,
                "about": f"Tier {done.tier}. The charts are of {page['title']}.",
                "tables": [page_table(table) for table in done.tables],
                "notes": [*done.all_notes(), *(f"failed: {each}" for each in done.failures)],
            },
        )
