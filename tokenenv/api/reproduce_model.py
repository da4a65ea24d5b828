"""The rows of a paper's table for one model: trained, matched, measured, timed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from agents.policies import POLICY
from agents.policies.words import parse_policy
from agents.training import Run, train
from agents.training.request import make_request
from agents.training.rl import UNTRAINED
from agents.training.run import REPORT
from agents.training.trainer import CHECKPOINT
from tokenenv.api.compare import Work, write_comparison
from tokenenv.api.opening import Opened, open_candidates
from tokenenv.artefact import FAULTS, read_object
from tokenenv.data import ImageSource, open_source
from tokenenv.errors import UserError, why
from tokenenv.game.cost import Cost
from tokenenv.measure.comparison import Comparison
from tokenenv.measure.evaluation import Evaluation, dense_predictions, evaluate
from tokenenv.measure.opening import Model
from tokenenv.measure.state import State, conditions
from tokenenv.papers.matching import Match, Measured, match
from tokenenv.papers.protocol import (
    DENSE,
    IMAGENET,
    IMAGENET_A,
    SEARCHED,
    Baseline,
    Paper,
    Study,
    Tier,
)
from tokenenv.papers.table import Line, Table, dense_figures, figures, with_claims
from tokenenv.storage import write_json
from tokenenv.tuning.rates import RateSearch, word_of
from tokenenv.vit.backbone import Backbone

_SEARCH_IMAGES, _SEARCH_STEPS = 64, 24
"""DiffRate's search: images that rates are tried on, and steps in which one block could empty."""


@dataclass(frozen=True)
class Asked:
    """What was asked for, checked.

    Attributes:
        paper: the protocol.
        tier: how much of it is run.
        name: the tier's name.
        seeds: how many.
        data: folder with the training and test images; None: the embedded ones.
        views: for each further set its folders by name; those of ImageNet-C are several.
        out: the folder to write to.
        device: such as ``cuda``.
        dtype: precision of measuring.
    """

    paper: Paper
    tier: Tier
    name: str
    seeds: int
    data: str | None
    views: dict[str, dict[str, str]]
    out: Path
    device: str
    dtype: str


class Entry(NamedTuple):
    """One thing to measure: a run, a policy's start, or a matched baseline."""

    label: str
    part: str
    seed: int | None
    word: str

    @property
    def name(self) -> str:
        """What tables call it."""
        start = ", untrained" if self.part == UNTRAINED else ""
        return f"{self.label}{start}" + ("" if self.seed is None else f", seed {self.seed}")


class OneModel:
    """The work on one model; each step leaves out what an earlier call has done.

    Args:
        asked: what was asked for.
        name: timm's name of the model.
        weights: a file, or None for timm's.

    Attributes:
        failed: reasons by the label of the row, or by the name of an entry.
    """

    def __init__(self, asked: Asked, name: str, weights: str | None) -> None:
        self.asked, self.name, self.weights = asked, name, weights
        self.folder = asked.out / re.sub(r"[^\w.-]+", "-", name)
        self.failed: dict[str, str] = {}
        self.matches: dict[str, Match] = {}
        self.comparison: Comparison | None = None

    def studies(self) -> list[Study]:
        """What is trained in this tier; the paper's method first."""
        return [study for study in self.asked.paper.studies if study.part in self.asked.tier.parts]

    def seeds(self, study: Study) -> range:
        """The seeds of a study."""
        return self.asked.tier.seeds_of(study, self.asked.seeds)

    def run_folder(self, study: Study, seed: int) -> Path:
        """Where a study's run lies."""
        return self.folder / "runs" / f"{_slug(study.name)}-{seed}"

    def finished(self, study: Study, seed: int) -> bool:
        """Whether a run is complete."""
        folder = self.run_folder(study, seed)
        return (folder / REPORT).is_file() and not Run.open(folder).stopped

    def arguments(self, study: Study, seed: int = 0) -> dict[str, Any]:
        """Arguments of ``train`` for a study; those that follow from earlier steps are left out."""
        tier = self.asked.tier
        return {
            "model": self.name, "weights": self.weights, "data": self.asked.data,
            "images": tier.images, "seed": seed, "device": self.asked.device,
            **tier.settings_of(study),
        }  # fmt: skip

    # Training ---------------------------------------------------------------------------------
    def train(self, study: Study) -> None:
        """Train a study with each seed; a seed that fails is noted."""
        for seed in self.seeds(study):
            if self.finished(study, seed):
                continue
            print(f"\n{study.name}, seed {seed}, on {self.name}")
            with self._noting(Entry(study.name, study.part, seed, "").name):
                self._train(study, seed)

    def _train(self, study: Study, seed: int) -> None:
        arguments, out = self.arguments(study, seed), self.run_folder(study, seed)
        if study.under:
            policy = next(each for each in self.studies() if each.name == study.under)
            if not self.finished(policy, seed):
                raise UserError(f"'{policy.name}', whose policy it needs, has no run")
            arguments["policy"] = str(self.run_folder(policy, seed))
        if study.keep_of:
            if study.keep_of not in self.matches:
                raise UserError(f"'{study.keep_of}', whose keep it takes, was not matched")
            word = self.matches[study.keep_of].word
            arguments["keep"] = float(word.partition("keep=")[2].split(",")[0])
        resume = (out / CHECKPOINT).is_file()
        if train(study.system, out=out, resume=resume, **arguments).stopped:
            raise KeyboardInterrupt("finished rows are kept; the same command goes on")

    # Matching ---------------------------------------------------------------------------------
    def match(self) -> None:
        """Set every baseline as accurate, or as cheap, as the paper's method with the first seed.

        It is measured on the training images that this run held back.
        """
        path, method = self.folder / "baselines.json", self.asked.paper.method
        if path.is_file():
            try:
                known = read_object(path, {}, "remove it")
                self.matches = {name: Match.from_dict(found) for name, found in known.items()}
            except FAULTS as error:
                raise UserError(f"cannot read '{path}' ({error}): remove it") from None
        missing = [each for each in self.asked.paper.baselines if each.name not in self.matches]
        if not missing or not self.finished(method, 0):
            reason = self.failed.get(f"{method.name}, seed 0", "it has no run")
            self.failed |= {
                each.name: f"nothing to match it with: {method.name} failed ({reason})"
                for each in missing
            }
            return
        try:
            judge = Judge(self, method)
        except Exception as error:
            self.failed |= {each.name: why(error) for each in missing}
            return
        by = self.asked.paper.match
        for baseline in missing:
            with self._noting(baseline.name):
                found = match(judge.words(baseline), judge.measure, judge.reference, by)
                self.matches[baseline.name] = found
                write_json(path, {name: each.to_dict() for name, each in self.matches.items()})
                print(
                    f"  {baseline.name}: {found.word} of {found.tried} settings tried, "
                    f"{found.found.saved:.1f} % saved, top-1 {found.found.top1:.2f} % (the "
                    f"paper's method {judge.reference.saved:.1f}, {judge.reference.top1:.2f})"
                )

    # Measuring --------------------------------------------------------------------------------
    def entries(self) -> list[Entry]:
        """All that there is to measure."""
        found = []
        for study in self.studies():
            for seed in self.seeds(study):
                if not self.finished(study, seed):
                    continue
                folder = self.run_folder(study, seed)
                found.append(Entry(study.name, study.part, seed, str(folder)))
                if (folder / UNTRAINED / POLICY).is_file():
                    start = str(folder / UNTRAINED)
                    found.append(Entry(study.name, UNTRAINED, seed, start))
        found += [Entry(name, "baseline", None, each.word) for name, each in self.matches.items()]
        return found

    def measure(self) -> list[Table]:
        """Evaluate everything on every set, and time it on the first: a table for each set."""
        entries = self.entries()
        opened, entries = self._open(entries)
        if opened is None:
            lines = [line for line in self._lines(entries, {}, {}) if line.part != DENSE]
            return [with_claims(self.asked.paper, Table(self.name, IMAGENET, "nothing", lines))]
        tables = []
        sets: dict[str, dict[str, Any]] = {IMAGENET: {"": self.asked.data}, **self.asked.views}
        for data, views in sets.items():
            works = [
                self._work(opened, entries, data, view, place) for view, place in views.items()
            ]
            tables.append(self._table(data, works, entries))
        return tables

    def _open(self, entries: list[Entry]) -> tuple[Opened | None, list[Entry]]:
        """The models of all entries; those that can't be opened are noted and left out."""
        try:
            return self._opened(entries), entries
        except Exception:  # one of them: which?
            good = []
            for entry in entries:
                with self._noting(entry.name):
                    self._opened([entry])
                    good.append(entry)
            return (self._opened(good), good) if good else (None, [])

    def _opened(self, entries: Sequence[Entry]) -> Opened:
        asked = self.asked
        model = Model(self.name, self.weights, asked.device, asked.dtype)
        opened = open_candidates([each.word for each in entries], model, data=asked.data)
        candidates: list[Any] = list(opened.candidates)
        named = tuple(
            replace(each, what=entry.name, group=entry.label)
            for each, entry in zip(candidates, entries, strict=True)
        )
        return replace(opened, candidates=named)

    def _work(
        self, opened: Opened, entries: list[Entry], data: str, view: str, place: str | None
    ) -> Work:
        """All entries evaluated on one folder, and timed where it is the first."""
        asked, tier, first = self.asked, self.asked.tier, data == IMAGENET
        source = open_source(place, opened.dense.model, split="test", limit=tier.limit)
        out = self.folder / "measured" / _slug(f"{data} {view}")
        out.mkdir(parents=True, exist_ok=True)
        common = {"dtype": asked.dtype, **conditions(self.name, opened.dense.model, source)}
        series = {
            e.name: Entry(e.label, e.part, None, "").name for e in entries if e.seed is not None
        }
        work = Work(
            opened, source, State(out, common), tier.rounds, [tier.batch] if first else [], series,
            published=True, restrict=data == IMAGENET_A, go_on=True,
        )  # fmt: skip
        print(f"\n{self.name}: {len(entries)} rows on {len(source)} images of {source.name}")
        work.evaluate()
        if work.done:
            with self._noting("times"):
                work.time()
        return work

    def _table(self, data: str, works: list[Work], entries: list[Entry]) -> Table:
        """The table of one set from the works on its views."""
        for work in works:
            self.failed |= work.failed
        done = {
            entry.name: [work.done[entry.name] for work in works]
            for entry in entries
            if all(entry.name in work.done for work in works)
        }
        speeds = {row.what: row for rows in works[0].times.values() for row in rows}
        lines, source = self._lines(entries, done, speeds), works[0].source
        images = f"{len(source)} images of {source.name}"
        if len(works) > 1:
            images = f"{len(works)} views of {len(source)} images each, such as {source.name}"
        timing = ""
        if done and len(works) == 1:
            comparison = works[0].comparison()
            timing = comparison.timing and f"{comparison.timing}, batch {self.asked.tier.batch}"
            if "times" in self.failed:
                timing = f"failed ({self.failed['times']})"
            write_comparison(comparison, self.folder / "compared" / _slug(data))
            self.comparison = self.comparison or comparison
        return with_claims(self.asked.paper, Table(self.name, data, images, lines, timing))

    def _lines(
        self, entries: list[Entry], done: dict[str, list[Evaluation]], speeds: dict[str, Any]
    ) -> list[Line]:
        """A line for each label, from its seeds."""
        lines = []
        if done:
            lines.append(
                Line(DENSE, DENSE, here=dense_figures(next(iter(done.values())), speeds.get(DENSE)))
            )
        labels: list[tuple[str, str]] = [(each.name, each.part) for each in self.studies()]
        labels += [(name, UNTRAINED) for name, part in labels if part == "paper"]
        labels += [(each.name, "baseline") for each in self.asked.paper.baselines]
        for label, part in labels:
            own = [e for e in entries if (e.label, e.part) == (label, part)]
            runs = [done[e.name] for e in own if e.name in done]
            failure = "; ".join(dict.fromkeys(self._failures(label, part)))
            if not runs and (part == UNTRAINED or not failure):
                continue
            here = figures(runs, speeds.get(own[0].name)) if runs else None
            found = self.matches.get(label) if part == "baseline" else None
            lines.append(Line(label, part, _setting(found), here, failure=failure))
        return sorted(lines, key=lambda line: _ORDER.index(line.part))

    def _failures(self, label: str, part: str) -> Iterator[str]:
        """Why a label's row, or a seed of it, is missing."""
        names = [Entry(label, part, seed, "").name for seed in range(self.asked.seeds)]
        for name in (label, *names):
            if name in self.failed and part != UNTRAINED:
                yield self.failed[name] if name == label else f"{name}: {self.failed[name]}"

    def _noting(self, name: str) -> _Noting:
        return _Noting(self.failed, name)


_ORDER = (DENSE, "paper", UNTRAINED, "baseline", "ablation")


def _setting(found: Match | None) -> str:
    if found is None:
        return ""
    return found.word if found.reached else f"{found.word} (not matched: its end)"


class _Noting:
    """A context in which an error is noted under a name, and the work goes on after it."""

    def __init__(self, failed: dict[str, str], name: str) -> None:
        self.failed, self.name = failed, name

    def __enter__(self) -> None:
        self.failed.pop(self.name, None)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, Exception):
            return False
        self.failed[self.name] = why(error)
        print(f"  {self.name} failed: {self.failed[self.name]}")
        return True


class Judge:
    """Measures baselines on the training images that the first run of a study held back."""

    def __init__(self, one: OneModel, study: Study) -> None:
        request = make_request(study.system, **one.arguments(study))
        self.backbone: Backbone = request.model.open_backbone(request.data)
        # Apart from it, as a model with LTM blocks is opened beside one that is not cut in stages.
        (candidate,) = open_candidates(
            [str(one.run_folder(study, 0))], request.model, data=request.data
        ).candidates
        images = request.training_images(self.backbone)
        held = request.divide(images)[1]
        tries = one.asked.tier.tries
        self.source: ImageSource = held if tries is None else held.subset(tries, 0)
        self.dense = dense_predictions(self.backbone, self.source)
        self.reference = _measured(candidate.evaluate(self.backbone, self.source, dense=self.dense))

    def measure(self, word: str) -> Measured:
        """A setting, measured."""
        method = parse_policy(word, self.backbone.depth).on(self.backbone.device)
        return _measured(evaluate(self.backbone, method, self.source, dense=self.dense))

    def words(self, baseline: Baseline) -> list[str]:
        """The settings of a baseline; DiffRate's are found by a greedy search on few images."""
        if baseline.word != SEARCHED:
            return baseline.words(self.backbone.patches)
        few = self.source.subset(_SEARCH_IMAGES, 0)
        batch = few.batch(torch.arange(len(few)))
        images = batch.images.to(self.backbone.device, self.backbone.dtype)
        with torch.inference_mode():
            dense = self.backbone(images).float().log_softmax(-1)
            search = RateSearch(self.backbone, images, dense, Cost(self.backbone))
            step = max(1, self.backbone.patches // _SEARCH_STEPS)
            path = search.path(step, last=_LAST)
            return [word_of(rates) for rates, outcome in path if outcome.saving > 0]


_LAST = 0.85
"""Share of the multiply-adds after which the search for rates ends."""


def _measured(found: Evaluation) -> Measured:
    top1 = 100 * (found.reduced == found.labels).double().mean().item()
    return Measured(top1, found.saving)


def _slug(text: str) -> str:
    return re.sub(r"[^\w]+", "-", text.lower()).strip("-")
