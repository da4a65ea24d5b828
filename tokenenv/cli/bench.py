"""``tokenenv bench``: policies against the dense model on the clock."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from agents.policies.words import parse_policy
from tokenenv.cli.common import open_backbone, open_dense
from tokenenv.cli.evaluate import adopt, fit, writable_file
from tokenenv.cli.merged import open_merged
from tokenenv.data import open_source
from tokenenv.data.pixels import Preprocess
from tokenenv.errors import UserError
from tokenenv.game.policy import Method
from tokenenv.measure.speed import DENSE, Speed, bench, timings
from tokenenv.storage import write_bytes, write_json
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.load import DIGITS_MODELS, Dense


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    args.what, args.batch = list(dict.fromkeys(args.what)), list(dict.fromkeys(args.batch))
    if args.json and args.out and Path(args.json).resolve() == Path(args.out).resolve():
        raise UserError("--json and --out name the same file: give two")
    with contextlib.ExitStack() as places:  # before minutes of work
        places.enter_context(writable_file(args.json))
        places.enter_context(writable_file(args.out, "--out"))
        if args.threads:
            torch.set_num_threads(args.threads)
        merged = open_merged(args, args.what)
        played = [what for what in args.what if what not in merged]
        adopt(args, *played)
        backbone: Backbone | Dense
        policies: dict[str, Method] = {}
        if played:
            whole, name = open_backbone(args, images=False)
            policies = {what: parse_policy(what, whole.depth) for what in played}
            for policy in policies.values():
                fit(policy, whole, name)
            backbone = whole
        else:
            backbone, name = open_dense(args, images=False)
        images, origin = _images(args, backbone, name)
        compiled = args.compile if args.compile is not None else backbone.device.type == "cuda"
        how = f"{args.device}, {args.dtype}{', compiled' if compiled else ''}"
        print(
            f"{name}, {origin}, {how}, {torch.get_num_threads()} threads, "
            f"torch {torch.__version__}, median of {args.rounds} rounds (1 MAC = 1 FLOP)"
        )
        print(_HEADER)
        found: list[Speed] = []
        try:
            for batch in args.batch:
                some = images[torch.arange(batch, device=images.device) % len(images)]
                total = timings(len(policies), args.rounds, len(merged))
                with tqdm(total=total, desc=f"batch {batch}", leave=False, disable=None) as bar:
                    rows = bench(
                        backbone,
                        policies,
                        some,
                        models=merged,
                        rounds=args.rounds,
                        compiled=compiled,
                        execution=args.execution,
                        progress=bar.update,
                    )
                found += rows
                for row in rows:
                    print(_line(row))
        finally:
            if found:  # also what was done before Ctrl-C
                _write(args, found, name)
    return 0


def _write(args: argparse.Namespace, found: list[Speed], name: str) -> None:
    if args.json:
        write_json(Path(args.json), [row.as_json() for row in found])
        print(f"the numbers are in {args.json}")
    if args.out:
        write_bytes(Path(args.out), picture(found, name))
        print(f"the picture is in {args.out}")


def _images(args: argparse.Namespace, backbone: Backbone | Dense, name: str) -> tuple[Tensor, str]:
    """As many as the largest batch, or as there are, and where they are from."""
    count = max(args.batch)
    place = backbone.device
    if args.data is None and name not in DIGITS_MODELS:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn((count, *Preprocess(backbone.model).shape), generator=generator)
        return images.to(place, backbone.dtype), "random images"
    source = open_source(args.data, backbone.model, split="test", limit=count)
    images = source.batch(torch.arange(len(source))).images
    if not len(images):
        raise UserError(f"no image of '{source.name}' could be read: check the files")
    return images.to(place, backbone.dtype), f"{len(images)} images of {source.name}"


_HEADER = (
    f"{'batch':>5}  {'what':36}{'images/s':>9}{'speed-up (quartiles)':>24}{'GMACs':>9}"
    f"{'saved %':>9}{'peak MiB':>10}{'sliced':>8}{'share':>7}"
)


def _line(row: Speed) -> str:
    quartiles = f"{row.speedup:.3f} ({row.speedup_q25:.3f}-{row.speedup_q75:.3f})"
    limit = [
        "-" if value is None else f"{value:.3f}"
        for value in (row.slice_speedup, row.realised_share)
    ]
    return (
        f"{row.batch:5}  {row.what:36}{row.images_per_s:9.1f}{quartiles:>24}{row.gmacs:9.4f}"
        f"{_saved(row):9.1f}{row.peak_mib:10.1f}{limit[0]:>8}{limit[1]:>7}"
    )


def _saved(row: Speed) -> float:
    return 100 * (1 - row.gmacs / row.gmacs_dense)


def picture(rows: list[Speed], model: str) -> bytes:
    """PNG: speed-up against multiply-adds saved, and the limit that the token counts set."""
    # Not pyplot: it keeps figures, and looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    names = list(dict.fromkeys(row.what for row in rows if row.what != DENSE))
    marks = dict(zip(names, itertools.cycle("os^Dv*XP")))
    batches = sorted({row.batch for row in rows})
    for row in rows:
        if row.what == DENSE:
            continue
        colour, saved = f"C{batches.index(row.batch)}", _saved(row)
        if row.slice_speedup is not None:
            axis.plot([saved, saved], [row.speedup, row.slice_speedup], ":", color=colour, lw=1)
            axis.plot(saved, row.slice_speedup, "_", color=colour, ms=14, mew=2)
        spread = [[row.speedup - row.speedup_q25], [row.speedup_q75 - row.speedup]]
        axis.errorbar(saved, row.speedup, spread, fmt=marks[row.what], color=colour, ms=6)
    for number, batch in enumerate(batches):
        axis.plot([], [], color=f"C{number}", lw=4, label=f"batch {batch}")
    axis.plot([], [], "_", color="0.3", ms=14, mew=2, label="limit: the model sliced")
    for name in names:
        axis.plot([], [], marks[name], color="0.3", ms=6, label=name)
    axis.axhline(1, color="0.4", lw=1)
    axis.set_xlabel("multiply-adds saved, policy included, %")
    axis.set_ylabel("speed-up over the dense model")
    axis.set_title(f"{model}: median and quartiles of ratios within a round", fontsize=10)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    return buffer.getvalue()
