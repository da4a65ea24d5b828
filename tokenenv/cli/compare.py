"""``tokenenv compare``: many policies and runs on the same images, as tables and a picture."""

from __future__ import annotations

import argparse
import copy
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from agents.policies import POLICY
from agents.policies.words import parse_policy, split_name, usages
from agents.training.run import MODEL
from tokenenv.cli.common import open_backbone, open_dense
from tokenenv.cli.evaluate import check_same_model, fit, folder_of, trained_on
from tokenenv.cli.merged import open_merged
from tokenenv.data import ImageSource, open_source
from tokenenv.errors import UserError
from tokenenv.game.policy import Method
from tokenenv.ltm.model import LTM
from tokenenv.measure import evaluation as metrics
from tokenenv.measure.comparison import (
    TOLERATED,
    Comparison,
    Row,
    best_row,
    dense_row,
    expand,
    in_words,
    make_row,
)
from tokenenv.measure.pareto import picture
from tokenenv.measure.printing import report_skipped
from tokenenv.measure.speed import DENSE, Speed, bench, timings
from tokenenv.measure.state import State, conditions
from tokenenv.storage import writable_folder, write_bytes, write_json
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.load import Dense, load_backbone

_BATCH = 64  # as evaluate's; how images are batched decides only what random policies draw


@dataclass(frozen=True)
class _Entry:
    """One row to be: a policy and the backbone it plays on, or a model with LTM blocks.

    ``key`` changes with what a run folder holds, so that a run trained on is evaluated anew.
    """

    what: str
    key: str
    player: tuple[Method, Backbone] | LTM
    frozen: bool

    def evaluate(self, reference: Backbone | Dense, source: ImageSource, **options: Any) -> Any:
        """Its :class:`~tokenenv.measure.evaluation.Evaluation`."""
        if isinstance(self.player, LTM):
            lengths = self.player.lengths
            return metrics.evaluate_model(
                self.player, reference, source, lengths=lengths, batch_size=_BATCH, **options
            )
        policy, backbone = self.player
        policy = copy.deepcopy(policy)  # one that draws starts afresh on the clock
        found = metrics.evaluate(backbone, policy, source, batch_size=_BATCH, **options)
        return replace(found, dense_macs=metrics.dense_macs(reference, source.shape))


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    whats = list(dict.fromkeys(_plain(one) for what in args.what for one in expand(what)))
    out, args.batch = Path(args.out), list(dict.fromkeys(args.batch))
    with writable_folder(out):  # before minutes of work
        backbone, name, entries = _open(args, whats)
        source = open_source(args.data, backbone.model, split="test", limit=args.limit)
        # Before the weights, which are others in another precision.
        state = State(out, {"dtype": args.dtype, **conditions(name, backbone.model, source)})
        print(f"comparing {len(entries)} rows on {name}: {len(source)} images of {source.name}")
        print(_HEADER)
        timing = (
            f"{args.device}, {args.dtype}, {torch.get_num_threads()} threads, "
            f"torch {torch.__version__}, median of {args.rounds} rounds"
        )
        done: dict[str, metrics.Evaluation] = {}
        times: dict[int, list[Speed]] = {}
        try:
            _evaluate(entries, backbone, source, state, done)
            report_skipped(source)
            readable = next(iter(done.values())).index
            images = source.batch(readable[: max(args.batch)]).images
            _time(args, entries, backbone, images, state, times)
        except KeyboardInterrupt:
            if done:
                _write(out, entries, done, times, name, source, timing if times else "")
            raise KeyboardInterrupt(
                f"{len(done)} of {len(entries)} rows are evaluated; the same command goes on"
            ) from None
        comparison = _write(out, entries, done, times, name, source, timing)
        print(
            f"hypervolume, MACs saved for 0 to {TOLERATED:g} points of top-1, averaged; points won "
            "over dense come on top, %:"
        )
        for method, covered in comparison.covered().items():
            print(f"  {method:46}{covered:8.2f}")
        print(f"the tables are in {out}/table.md, .csv and .json, the picture in {out}/pareto.png")
    return 0


def _plain(what: str) -> str:
    """A folder by one name: ``./runs/a/`` is ``runs/a``; ``./evit`` stays, ``evit`` is a method."""
    if what in usages() or not Path(what).is_dir():
        return what
    folder = os.path.normpath(what)
    return os.path.join(".", folder) if folder in usages() else folder


def _open(args: argparse.Namespace, whats: list[str]) -> tuple[Backbone | Dense, str, list[_Entry]]:
    """The dense model that all are compared with, its name, and the rows to be."""
    merged = open_merged(args, whats)
    played = [what for what in whats if what not in merged]
    if args.model is None:
        known = next((found for found in map(trained_on, played) if found), {})
        # All are compared with the model that a fine-tuned run started from.
        weights = known.get("original" if "original" in known else "weights")
        args.model, args.weights = known.get("model"), args.weights or weights
    entries = {what: _merged_entry(what, model) for what, model in merged.items()}
    if not played:
        dense, name = open_dense(args)
        return dense, name, list(entries.values())
    backbone, name = open_backbone(args)
    entries |= {what: _entry(what, backbone, name) for what in played}
    return backbone, name, [entries[what] for what in whats]


def _merged_entry(what: str, model: LTM) -> _Entry:
    """Of a model with LTM blocks, which brings its own weights."""
    digest = hashlib.sha256(Path(what, MODEL).read_bytes())
    return _Entry(what, f"{what} {digest.hexdigest()}", model, frozen=False)


def _entry(what: str, backbone: Backbone, name: str) -> _Entry:
    """Parse a WHAT, check that it fits, and load its own backbone where it was fine-tuned.

    Raises:
        UserError: it can't be parsed, doesn't fit, or its backbone is missing or another model.
    """
    policy, folder, known = parse_policy(what, backbone.depth), folder_of(what), trained_on(what)
    plays_on, tuned, digest = backbone, "original" in known, hashlib.sha256()
    if folder is not None:
        digest.update((folder / POLICY).read_bytes())
    if tuned:
        check_same_model([what], known, name)
        digest.update(Path(known["weights"]).read_bytes())
        plays_on = load_backbone(name, known["weights"], backbone.device, backbone.dtype)
    fit(policy, plays_on, name)
    return _Entry(what, f"{what} {digest.hexdigest()}", (policy, plays_on), not tuned)


def _evaluate(
    entries: list[_Entry],
    backbone: Backbone | Dense,
    source: ImageSource,
    state: State,
    done: dict[str, metrics.Evaluation],
) -> None:
    """Fill ``done``, by WHAT, with what the state has and what it lacks.

    Raises:
        UserError: not the same images can be read as before.
    """
    for entry in entries:
        if (kept := state.load(entry.key)) is not None:
            done[entry.what] = kept
            print(_line(_row(entry, kept)))
    missing = [entry for entry in entries if entry.what not in done]
    if not missing:
        return
    passes = len(missing) + (not done)
    with tqdm(total=passes * len(source), unit="image", leave=False, disable=None) as bar:
        dense = _dense(done, backbone, source, bar)
        for number, entry in enumerate(missing, passes - len(missing)):
            bar.update(number * len(source) - bar.n)  # the unreadable ones
            bar.set_description(entry.what)
            result = entry.evaluate(backbone, source, dense=dense, progress=bar.update)
            if not torch.equal(torch.where(dense >= 0)[0], result.index):
                raise UserError(
                    f"other images of '{source.name}' can be read than in the rows before: "
                    "restore the files, or give a new --out"
                )
            done[entry.what] = result
            state.save(entry.key, done[entry.what])
            tqdm.write(_line(_row(entry, done[entry.what])))
            best = best_row([_row(e, done[e.what]) for e in entries if e.what in done])
            if best:
                bar.set_postfix_str(f"within a point: {best.what} saves {best.saved:.1f} %")


def _dense(
    done: dict[str, metrics.Evaluation],
    backbone: Backbone | Dense,
    source: ImageSource,
    bar: tqdm[Any],
) -> Tensor:
    """``(len(source),)`` the dense model's predictions, as some row has them; -1: unreadable."""
    if done:
        known = next(iter(done.values()))
        return torch.full((len(source),), -1).index_put((known.index,), known.dense)
    bar.set_description(DENSE)
    return metrics.dense_predictions(backbone, source, batch_size=_BATCH, progress=bar.update)


def _time(
    args: argparse.Namespace,
    entries: list[_Entry],
    backbone: Backbone | Dense,
    images: Tensor,
    state: State,
    times: dict[int, list[Speed]],
) -> None:
    """Fill ``times``: all rows of a batch size in turns, in one go, unless the state has them."""
    asked = {
        "rows": sorted(entry.key for entry in entries),
        "rounds": args.rounds,
        "device": args.device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    images = images.to(backbone.device, backbone.dtype)
    merged = {entry.what: entry.player for entry in entries if isinstance(entry.player, LTM)}
    played = {entry.what: entry.player for entry in entries if isinstance(entry.player, tuple)}
    for batch in args.batch:
        rows = state.load_speeds(batch, asked)
        if rows is None:
            total = timings(len(played), args.rounds, len(merged))
            with tqdm(total=total, desc=f"batch {batch}", leave=False, disable=None) as bar:
                rows = bench(
                    backbone,
                    {what: policy for what, (policy, _) in played.items()},
                    images[torch.arange(batch, device=images.device) % len(images)],
                    backbones={what: own for what, (_, own) in played.items()},
                    models=merged,
                    rounds=args.rounds,
                    progress=bar.update,
                )
            state.save_speeds(batch, asked, rows)
        times[batch] = rows
        for row in rows:
            speed = f"{row.images_per_s:9.1f} images/s{row.speedup:7.2f} x"
            print(f"  batch {batch}: {row.what:44}{speed}")


def _write(
    out: Path,
    entries: list[_Entry],
    done: dict[str, metrics.Evaluation],
    times: dict[int, list[Speed]],
    model: str,
    source: ImageSource,
    timing: str,
) -> Comparison:
    """Write tables and picture of the rows that are done."""
    speeds: dict[str, list[Speed]] = {}
    for rows in times.values():
        for speed in rows:
            speeds.setdefault(speed.what, []).append(speed)
    finished = [entry for entry in entries if entry.what in done]
    comparison = Comparison(
        [
            dense_row(done[finished[0].what], speeds.get(DENSE, ())),
            *(_row(entry, done[entry.what], speeds.get(entry.what, ())) for entry in finished),
        ],
        model,
        source.name,
        timing,
    )
    write_bytes(out / "table.md", comparison.as_markdown().encode())
    write_bytes(out / "table.csv", comparison.as_csv().encode())
    write_json(out / "table.json", comparison.as_json())
    write_bytes(out / "pareto.png", picture(comparison))
    return comparison


def _row(entry: _Entry, result: metrics.Evaluation, speeds: Sequence[Speed] = ()) -> Row:
    return make_row(entry.what, split_name(entry.what)[0], entry.frozen, result, speeds)


_HEADER = f"  {'':46}{'top-1 %':>9}{'lost, pp [95 %]':>24}{'same %':>8}{'GMACs':>9}{'saved %':>9}"


def _line(row: Row) -> str:
    lost = f"{row.lost:.2f} [{row.lost_low:.2f}, {row.lost_high:.2f}]"
    mark = "" if row.frozen else f"  {in_words(row.frozen)}"
    return (
        f"  {row.what:46}{row.top1:9.2f}{lost:>24}{row.agreement:8.1f}{row.gmacs:9.4f}"
        f"{row.saved:9.1f}{mark}"
    )
