"""Many methods on the same images: tables, times, a picture; resumable."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from agents.policies.words import plain
from tokenenv.api.opening import Opened, each_once, open_candidates
from tokenenv.api.series import series_of
from tokenenv.data import ImageSource, Preprocessing, open_source
from tokenenv.data.labels import class_names
from tokenenv.errors import UserError, check_keywords, why
from tokenenv.game.checks import MOST_IMAGES, MOST_ROUNDS, check_whole
from tokenenv.machine import describe_machine
from tokenenv.measure.candidate import Candidate
from tokenenv.measure.classes import class_rows, classes_csv
from tokenenv.measure.comparison import (
    Comparison,
    Row,
    best_row,
    dense_exact_row,
    dense_row,
    expand,
    in_nats,
    make_row,
    top1_change,
    tuning,
)
from tokenenv.measure.evaluation import Evaluation, dense_logits
from tokenenv.measure.latex import latex
from tokenenv.measure.opening import named_model, text
from tokenenv.measure.pareto import picture
from tokenenv.measure.printing import report_skipped
from tokenenv.measure.seeds import seed_rows, seeds_markdown
from tokenenv.measure.speed import DENSE, Speed, bench, pool_size, timings
from tokenenv.measure.state import Memory, State, conditions
from tokenenv.page.data import page_of_comparison
from tokenenv.page.html import write_page
from tokenenv.paths import as_path
from tokenenv.storage import own_folder, write_bytes, write_json

_BATCH = 64  # as in evaluate; it affects only the draws of random policies


@check_keywords
def compare(
    what: Sequence[Any],
    *,
    model: str | None = None,
    weights: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    batch: Sequence[int] = (1, 64),
    rounds: int = 5,
    out: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    preprocessing: Preprocessing | None = None,
    trust: bool = False,
    seeds: bool = False,
    published_cost: bool = False,
) -> Comparison:
    """Evaluate methods on one model and the same images, then time them; as ``tokenenv compare``.

    Rows are printed as they are finished. With ``out``, finished rows are kept after Ctrl-C, and
    the same call continues with the rest; it may then name further methods.

    Args:
        what: methods, each as :func:`tokenenv.evaluate` takes it; in a word ``key=1|2|3`` is a
            sweep.
        model: see :func:`tokenenv.evaluate`.
        weights: see :func:`tokenenv.evaluate`.
        data: see :func:`tokenenv.evaluate`.
        limit: see :func:`tokenenv.evaluate`.
        batch: batch sizes to time; empty: nothing is timed.
        rounds: number of timings of each method.
        out: a folder for ``table.md``, ``.csv``, ``.json`` and ``.tex``, ``classes.csv``,
            ``pareto.png``, ``report.html`` and the state to continue from; None: no file is
            written.
        device: see :func:`tokenenv.evaluate`.
        dtype: see :func:`tokenenv.evaluate`.
        preprocessing: see :func:`tokenenv.evaluate`.
        trust: see :func:`tokenenv.evaluate`.
        seeds: whether runs that differ in nothing but the seed, and words in nothing but
            ``seed=``, are also summarised: mean, standard deviation, interval of the mean.
        published_cost: whether multiply-adds count the last block in full, as papers do. By default
            they are those executed, of the last block what the head reads, if that is the class
            token; a row ``dense, exact`` then shows what that saves without removing any token.
            Savings are always of the dense model in full.

    Raises:
        UserError: an argument is wrong; the message names it and the remedy.
        KeyboardInterrupt: after Ctrl-C; the message says how many rows are kept.
    """
    batches = [check_whole("batch", size, 1, MOST_IMAGES + 1) for size in dict.fromkeys(batch)]
    check_whole("rounds", rounds, 1, MOST_ROUNDS + 1)
    if limit is not None:
        check_whole("limit", limit, 1)
    whats = each_setting(what)
    folder = None if out is None else as_path(out, "out")
    place = contextlib.nullcontext() if folder is None else own_folder(folder)
    with place:  # before minutes of work
        opened = open_candidates(
            whats,
            named_model(model, weights, device, dtype, preprocessing),
            data=text(data, "data"),
            trust=trust,
        )
        series = series_of([each.what for each in opened.candidates]) if seeds else {}
        source = open_source(text(data, "data"), opened.dense.model, split="test", limit=limit)
        common = {"dtype": dtype, **conditions(opened.model.name, opened.dense.model, source)}
        state = Memory() if folder is None else State(folder, common)
        print(
            f"comparing {len(whats)} rows on {opened.model.name}: {len(source)} images of "
            f"{source.name}"
        )
        print(f"preprocessing: {source.preprocessing}")
        print(_HEADER)
        work = Work(opened, source, state, rounds, batches, series, published=published_cost)
        try:
            work.evaluate()
            report_skipped(source)
            work.time()
        except KeyboardInterrupt:
            if work.done:
                write_comparison(work.comparison(), folder)
            raise KeyboardInterrupt(
                f"{len(work.done)} of {len(whats)} rows are evaluated; the same command goes on"
            ) from None
        comparison = work.comparison()
        write_comparison(comparison, folder)
    return comparison


def each_setting(what: Sequence[Any]) -> list[Any]:
    """The methods named, each once, with sweeps as their single settings."""
    return each_once(itertools.chain.from_iterable(map(_each, what)))


def _each(what: Any) -> list[Any]:
    """The settings of a sweep, with folders in normal form; any other object alone."""
    return [plain(one) for one in expand(what)] if isinstance(what, str) else [what]


def write_comparison(comparison: Comparison, folder: Path | None) -> None:
    """Write tables, picture and page to ``folder``, if there is one."""
    if folder is None:
        return
    tables = comparison.as_markdown()
    if comparison.seeds:
        tables += "\n" + seeds_markdown(comparison.seeds)
    write_bytes(folder / "table.md", tables.encode())
    write_bytes(folder / "table.csv", comparison.as_csv().encode())
    write_json(folder / "table.json", comparison.to_dict())
    write_bytes(folder / "table.tex", latex(comparison).encode())
    write_bytes(folder / "classes.csv", classes_csv(comparison.classes).encode())
    write_bytes(folder / "pareto.png", picture(comparison))
    write_page(folder / "report.html", page_of_comparison(comparison))


class Work:
    """A comparison in progress.

    Args:
        opened: the models.
        source: the images.
        state: what was measured before.
        rounds: number of timings of each.
        batches: batch sizes to time.
        series: the name of each candidate's series, by its own.
        published: whether multiply-adds are counted as published, the last block in full.
        restrict: predict only among the classes of the images.
        go_on: whether a candidate that fails is left out, and noted in :attr:`failed`.

    Attributes:
        done: evaluations by the name of the candidate.
        times: rows by batch size.
        failed: reasons by the name of the candidate.
    """

    def __init__(
        self,
        opened: Opened,
        source: ImageSource,
        state: State | Memory,
        rounds: int,
        batches: list[int],
        series: Mapping[str, str] | None = None,
        *,
        published: bool = False,
        restrict: bool = False,
        go_on: bool = False,
    ) -> None:
        self.opened, self.source, self.state = opened, source, state
        self.rounds, self.batches, self.series = rounds, batches, series or {}
        self.published, self.restrict, self.go_on = published, restrict, go_on
        self.failed: dict[str, str] = {}
        self.done: dict[str, Evaluation] = {}
        self.times: dict[int, list[Speed]] = {}

    def evaluate(self) -> None:
        """Fill :attr:`done`: from the saved state where possible, else by evaluating.

        Raises:
            UserError: other images are readable than when the saved rows were evaluated.
        """
        candidates = self.opened.candidates
        for candidate in candidates:
            if (kept := self.state.load(candidate.key)) is not None:
                self.done[candidate.what] = kept
                print(_line(self._row(candidate)))
        missing = [each for each in candidates if each.what not in self.done]
        if not missing:
            return
        images, passes = len(self.source), len(missing) + 1
        with tqdm(total=passes * images, unit="image", leave=False, disable=None) as bar:
            bar.set_description(DENSE)
            dense = dense_logits(
                self.opened.dense, self.source, batch_size=_BATCH, progress=bar.update
            )
            known = next(iter(self.done.values()), None)
            readable = torch.where(~dense[:, 0].isnan())[0] if known is None else known.index
            for number, candidate in enumerate(missing, passes - len(missing)):
                bar.update(number * images - bar.n)  # unreadable images were not counted
                bar.set_description(candidate.what)
                result = self._evaluate(candidate, dense, bar)
                if result is None:
                    continue
                if not torch.equal(readable, result.index):
                    raise UserError(
                        f"other images of '{self.source.name}' can be read than in the rows "
                        "before: restore the files, or give a new --out"
                    )
                self.done[candidate.what] = result
                self.state.save(candidate.key, result)
                tqdm.write(_line(self._row(candidate)))
                best = best_row(self._rows())
                if best:
                    bar.set_postfix_str(f"within a point: {best.what} saves {best.saved:.1f} %")

    def _evaluate(self, candidate: Candidate, dense: Tensor, bar: tqdm[Any]) -> Evaluation | None:
        """The evaluation of one candidate; None if it failed and the others shall go on."""
        try:
            return candidate.evaluate(
                self.opened.dense, self.source, batch_size=_BATCH, dense=dense,
                restrict=self.restrict, progress=bar.update,
            )  # fmt: skip
        except Exception as error:
            if not self.go_on:
                raise
            self.failed[candidate.what] = why(error)
            tqdm.write(f"  {candidate.what:46} failed: {self.failed[candidate.what]}")
            return None

    def time(self) -> None:
        """Fill :attr:`times`: from the saved state where possible, else by timing."""
        if not self.batches:
            return
        dense = self.opened.dense
        candidates = [each for each in self.opened.candidates if each.what in self.done]
        readable = next(iter(self.done.values())).index
        count = pool_size(max(self.batches))
        images = self.source.batch(readable[:count]).images.to(dense.device, dense.dtype)
        asked = {
            "rows": sorted(each.key for each in candidates),
            "rounds": self.rounds,
            "device": self.opened.model.device,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        for batch in self.batches:
            rows = self.state.load_speeds(batch, asked)
            if rows is None:
                total = timings(candidates, self.rounds)
                with tqdm(total=total, desc=f"batch {batch}", leave=False, disable=None) as bar:
                    rows = bench(
                        dense, candidates, images, batch=batch, rounds=self.rounds,
                        progress=bar.update,
                    )  # fmt: skip
                self.state.save_speeds(batch, asked, rows)
            self.times[batch] = rows
            for row in rows:
                speed = f"{row.images_per_s:9.1f} images/s{row.speedup:7.2f} x"
                print(f"  batch {batch}: {row.what:44}{speed}")

    def comparison(self) -> Comparison:
        """The finished rows as a comparison."""
        speeds: dict[str, list[Speed]] = {}
        for speed in itertools.chain.from_iterable(self.times.values()):
            speeds.setdefault(speed.what, []).append(speed)
        first = next(iter(self.done.values()))
        model = self.opened.model
        timing = (
            f"{describe_machine(self.opened.dense.device)}, {model.dtype}, nothing compiled, a "
            f"fresh batch in every pass, median of {self.rounds} rounds"
        )
        rows = self._rows(speeds)
        return Comparison(
            [*self._dense_rows(first, speeds.get(DENSE, ())), *rows],
            model.name,
            self.source.name,
            timing if self.times else "",
            class_rows(self.done, class_names(self.opened.dense.model)),
            seed_rows(rows, self.series),
            self.published,
        )

    def _dense_rows(self, result: Evaluation, speeds: Sequence[Speed]) -> list[Row]:
        dense, exact = dense_row(result, speeds), dense_exact_row(result)
        return [dense] if self.published or not exact.saved else [dense, exact]

    def _rows(self, speeds: dict[str, list[Speed]] | None = None) -> list[Row]:
        finished = [each for each in self.opened.candidates if each.what in self.done]
        return [self._row(each, (speeds or {}).get(each.what, ())) for each in finished]

    def _row(self, candidate: Candidate, speeds: Sequence[Speed] = ()) -> Row:
        found = self.done[candidate.what]
        if not self.published:
            found = found.as_executed()
        return make_row(candidate.what, candidate.group, candidate.frozen, found, speeds)


_HEADER = (
    f"  {'':46}{'top-1 %':>9}{'top-1 change, pp [95 %]':>26}{'same %':>8}{'nats':>9}{'GMACs':>9}"
    f"{'saved %':>9}"
)


def _line(row: Row) -> str:
    mark = "" if row.frozen else f"  {tuning(row.frozen)}"
    return (
        f"  {row.what:46}{row.top1:9.2f}{top1_change(row):>26}{row.agreement:8.1f}"
        f"{in_nats(row):>9}{row.gmacs:9.4f}{row.saved:9.1f}{mark}"
    )
