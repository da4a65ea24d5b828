"""The fastest model within an accuracy budget, on this machine's clock."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from tokenenv.api.opening import each_once, open_candidates
from tokenenv.api.tune_inputs import (
    MODEL,
    VERIFYING,
    Asked,
    check_budget,
    check_dense,
    check_folder,
    open_images,
)
from tokenenv.api.tune_onnx import OnnxForm, OnnxForms, Runtime, check_runtime, open_forms
from tokenenv.api.tune_saving import forget_model, save_model
from tokenenv.api.tune_training import train_policy
from tokenenv.artefact import reason_of
from tokenenv.data import ImageSource, Preprocessing
from tokenenv.deploy.candidate import RUNTIME, OnnxCandidate
from tokenenv.deploy.onnx import check_target
from tokenenv.errors import UserError, check_keywords
from tokenenv.game.checks import MOST_IMAGES, check_whole
from tokenenv.game.latency import open_table
from tokenenv.machine import compiler_found, describe_machine, fast_bfloat16
from tokenenv.measure.candidate import Candidate, MethodCandidate, Run
from tokenenv.measure.opening import named_model, text
from tokenenv.measure.speed import (
    DENSE,
    Compiled,
    Speed,
    bench,
    fresh_batches,
    in_turns,
    pool_size,
    timings,
)
from tokenenv.measure.state import conditions
from tokenenv.paths import as_path
from tokenenv.storage import own_folder, write_bytes, write_json
from tokenenv.tuning.picture import picture
from tokenenv.tuning.proposals import fitting, words_for
from tokenenv.tuning.result import Tuned
from tokenenv.tuning.search import Search, hopeless
from tokenenv.tuning.state import State
from tokenenv.tuning.trials import Reference, Trial
from tokenenv.tuning.verdict import Row, bound_of, certify
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.load import check_dtype

SEEDS = 2**32


@check_keywords
def tune(
    model: str | None = None,
    *,
    weights: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    budget: float = 0.5,
    batch: int = 1,
    methods: Sequence[Any] = (),
    only_methods: bool = False,
    train: float = 0.0,
    unlabelled: bool = False,
    compile: bool = False,
    limit: int | None = None,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    preprocessing: Preprocessing | None = None,
    trust: bool = False,
    runtime: Runtime = "torch",
    export: str | os.PathLike[str] | None = None,
) -> Tuned:
    """Find the fastest model that loses at most ``budget`` points here; as ``tokenenv tune``.

    The images are divided, by class, into those that choose (two fifths) and those that verify. The
    dense model is timed in each precision, and candidates run in the faster one: every reducer at
    some settings, greedy schedules over predicted time, shipped policies, smaller images, your own
    ``methods``, and with ``train`` a policy trained for this model and this clock. They are halved
    successively: divergence from the dense model on few images and a table of times, then the clock
    and more images. The best few are timed on fresh batches in turns with the dense model, and
    verified.

    Args:
        model: timm's name of the model; None: ``digits_vit``.
        weights: see :func:`tokenenv.evaluate`.
        data: see :func:`tokenenv.evaluate`; with ``unlabelled`` a folder of images.
        budget: top-1 that may be lost, percentage points; with ``unlabelled`` percent of the
            predictions that may change.
        batch: images per forward pass on the clock.
        methods: your own candidates, each as :func:`tokenenv.evaluate` takes it.
        only_methods: whether to try nothing else.
        train: seconds of training a policy; 0: none is trained.
        unlabelled: whether the images have no labels: what the dense model says counts as right.
        compile: whether compiled forms of the dense model and of the best candidates are timed.
        limit: largest number of images; None: all.
        seed: of the division of the images, and of the training.
        out: folder for the compressed model, ``tune.md``, ``tune.json``, ``tune.png`` and the state
            to continue from; None: no file is written.
        device: see :func:`tokenenv.evaluate`.
        dtype: precision of the candidates; None: ``float32``, and ``bfloat16`` where that is faster
            and may keep to the budget.
        preprocessing: see :func:`tokenenv.evaluate`.
        trust: see :func:`tokenenv.evaluate`.
        runtime: ``onnx``: the best methods and the dense model are exported, and run in ONNX
            Runtime on the CPU; the table of times alone chooses what to export. ``auto``: where one
            runtime runs the dense model 1.5 x as fast as the other, that one; else the best in
            torch are tried in both.
        export: ONNX file of the recommended model to write.

    Raises:
        UserError: an argument is wrong; the message names it and the remedy.
        KeyboardInterrupt: after Ctrl-C; with ``out`` the same call goes on.
    """
    asked = Asked(
        model=named_model(model, weights, device, "float32", preprocessing),
        data=text(data, "data"), budget=check_budget(budget),
        batch=check_whole("batch", batch, 1, MOST_IMAGES + 1), methods=tuple(each_once(methods)),
        only_methods=only_methods, train=train, unlabelled=unlabelled, compile=compile,
        limit=None if limit is None else check_whole("limit", limit, 1),
        seed=check_whole("seed", seed, 0, SEEDS),
        folder=None if out is None else as_path(out, "out"), dtype=dtype, trust=trust,
        runtime=runtime, export=None if export is None else check_target(export),
    )  # fmt: skip
    check_runtime(runtime, device, dtype, export is not None)
    if dtype is not None:
        check_dtype(dtype)
    if only_methods and not methods:
        raise UserError("only_methods leaves nothing to try: name methods, or leave it out")
    if not 0 <= train < math.inf:
        raise UserError(f"train={train} must be seconds from 0 on")
    if train and asked.folder is None:
        raise UserError("train needs a folder for the run: give out")
    if asked.folder is None:
        return _Tuning(asked).run()
    with own_folder(asked.folder):
        check_folder(asked.folder)
        work = _Tuning(asked)
        try:
            return work.run()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(work.kept()) from None
        except RuntimeError as error:
            if device == "cpu":
                raise
            raise UserError(
                f"device '{device}' failed ({reason_of(error)}); {work.kept()}"
            ) from error


class _Tuning:
    """A search in progress: opens everything, and goes from one stage to the next."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        try:
            opened = open_candidates(
                each_once(["keep-all", *asked.methods]),
                asked.model,
                data=asked.data,
                trust=asked.trust,
            )
        except UserError as error:
            if "is not supported" not in str(error):
                raise
            raise UserError(
                f"{error}. What works for every model of timm is to give it smaller images"
            ) from error
        if not isinstance(opened.dense, Backbone):
            raise UserError("a model that reduces its own tokens can't be tuned: give its method")
        for each in opened.candidates:
            if not isinstance(each, MethodCandidate):
                raise UserError(f"'{each.what}' is a model and no method: time it by bench")
        self.model, self.dense = opened.model, opened.dense
        self.source = open_images(asked, self.model, self.dense)
        self.choosing, self.verifying = self.source.split(VERIFYING, seed=asked.seed)
        self.state = State(
            asked.folder,
            {
                **conditions(self.model.name, self.dense.model, self.source),
                "machine": describe_machine(self.dense.device),
                "budget": asked.budget,
                "batch": asked.batch,
                "unlabelled": asked.unlabelled,
                "compile": asked.compile,
                "asked_dtype": asked.dtype,
                "runtime": asked.runtime,
                "seed": asked.seed,
            },
        )

    def run(self) -> Tuned:
        """Search, verify, write."""
        asked, measure = self.asked, "predictions changed" if self.asked.unlabelled else "top-1"
        print(
            f"tuning {self.model.name} for at most {asked.budget:g} points of {measure} at batch "
            f"{asked.batch}: {len(self.choosing)} images of {self.source.name} choose, "
            f"{len(self.verifying)} verify"
        )
        reference = self._reference(self.choosing)
        if not asked.unlabelled:
            print(f"the dense model has {reference.top1:.2f} % top-1 on those that choose")
            check_dense(reference.top1, self.source)
        backbone = self.dense if asked.runtime == "onnx" else self._backbone(reference)
        forms = open_forms(
            asked.runtime, self.state, self.dense, backbone, reference, asked.batch
        )  # fmt: skip
        alone = forms is not None and forms.alone
        backbone = self.dense if alone else backbone
        table = open_table(backbone, asked.batch, budget=5.0)
        compiled = asked.compile and compiler_found()
        search = Search(
            backbone, reference, self.state, table, asked.budget, compiled, clock=forms is None
        )
        best = self._own(backbone)
        if not asked.only_methods:
            print("finding schedules by predicted time, then halving all candidates")
            words = [*words_for(backbone), *search.rates()]
            best += search.halve(fitting(words, backbone, self.model.name))
            best += fitting(["keep-all"], backbone, self.model.name)  # the dense model in stages
        named = {each.what: each for each in best}
        best = search.complete(list(named.values()))
        if asked.train:
            best += search.complete(self._train(search, best, backbone))
        tuned = self._verify(search, best if forms is None else forms.add(search, best), forms)
        print(tuned.summary())
        self._write(tuned, best, forms)
        return tuned

    def kept(self) -> str:
        """What is not lost when the search ends early."""
        return (
            f"candidates tried so far: {len(self.state.trials)}, kept in '{self.asked.folder}'; "
            "the same command goes on"
        )

    def _reference(self, source: ImageSource) -> Reference:
        with tqdm(total=len(source), desc=DENSE, unit="image", leave=False, disable=None) as bar:
            return Reference(
                self.dense, source, labels=not self.asked.unlabelled, seed=self.asked.seed,
                progress=bar.update,
            )  # fmt: skip

    def _opened(self, dtype: str) -> Backbone:
        """The dense model in a precision."""
        if dtype == self.model.dtype:
            return self.dense
        return replace(self.model, dtype=dtype).open_backbone(self.asked.data)

    def _backbone(self, reference: Reference) -> Backbone:
        """The dense model in the precision in which it is fastest, of those within the budget."""
        asked = self.asked
        known = self.state.found.get("dtype", asked.dtype)
        if known is None and not fast_bfloat16(self.dense.device):
            known = "float32"
        if known is not None:
            check_dtype(known)
            return self._opened(known)
        half = self._opened("bfloat16")
        images = reference.images(pool_size(asked.batch)).to(half.device)
        fresh = fresh_batches(images, asked.batch)
        runs: dict[str, Run] = {
            "float32": self.dense,
            "bfloat16": lambda images: half(images.to(half.dtype)),
        }
        with torch.inference_mode():
            for run in runs.values():
                run(next(fresh))
            took = in_turns(runs, fresh, 5, max(1, 16 // asked.batch), half.device)
        ratio = float((took["float32"] / took["bfloat16"]).mean())
        (everything,) = fitting(["keep-all"], half, self.model.name)
        trial = reference.extend(Trial("bfloat16"), everything, len(reference), None)
        fits = not hopeless(trial.pairs, asked.budget)  # a few images are mostly chance
        print(
            f"the dense model in bfloat16 is {ratio:.2f} x as fast as in float32 and loses "
            f"{trial.pairs.lost:.2f} points, {trial.agreement:.1f} % same prediction"
        )
        chosen = "bfloat16" if fits and ratio > 1 else "float32"
        self.state.found["dtype"] = chosen
        self.state.save()
        return half if chosen == "bfloat16" else self.dense

    def _own(self, backbone: Backbone) -> list[MethodCandidate]:
        """The methods that were named, in the precision that was chosen."""
        if not self.asked.methods:
            return []
        dtype = str(backbone.dtype).removeprefix("torch.")
        opened = open_candidates(
            self.asked.methods, replace(self.model, dtype=dtype), data=self.asked.data,
            trust=self.asked.trust,
        )  # fmt: skip
        return [each for each in opened.candidates if isinstance(each, MethodCandidate)]

    def _train(
        self, search: Search, best: list[MethodCandidate], backbone: Backbone
    ) -> list[MethodCandidate]:
        """A policy trained for this model and this clock, at three thresholds."""
        folder = self.asked.folder
        assert folder is not None
        try:
            run = train_policy(
                self.model, self.asked.data, search, best, self.choosing,
                seconds=self.asked.train, seed=self.asked.seed, out=folder / "policy",
            )  # fmt: skip
        except UserError as error:
            print(f"no policy is trained: {error}")
            return []
        words = [str(run), *(f"{run}:threshold={threshold}" for threshold in (0.35, 0.65))]
        return fitting(words, backbone, self.model.name)

    def _verify(self, search: Search, best: Sequence[Candidate], forms: OnnxForms | None) -> Tuned:
        """Time the best ones on fresh batches, and see what they lose on the other images."""
        asked, named = self.asked, {each.what: each for each in best}
        finalists = [named[what] for what in search.ladder(best)]
        compiled: Compiled = "all" if search.compiled else "none"
        if asked.compile and not search.compiled:
            print("there is no C++ compiler: nothing is compiled")
        backbone = search.backbone
        images = search.reference.images(pool_size(asked.batch))
        images = images.to(backbone.device, backbone.dtype)
        total = timings(finalists, 7, compiled)
        with tqdm(total=total, desc="finalists", leave=False, disable=None) as bar:
            speeds = bench(
                backbone, finalists, images, batch=asked.batch, compiled=compiled,
                dense_forms={} if forms is None else {RUNTIME: forms.exported},
                progress=bar.update,
            )  # fmt: skip
        dense = tuple(row for row in speeds if row.what == DENSE)
        if backbone is not self.dense:
            dense = (*self._given(images, dense), *dense)
        reference = self._reference(self.verifying)
        rows = self._rows(search, finalists, speeds, reference)
        return Tuned(
            model=self.model.name, data=self.source.name, budget=asked.budget, batch=asked.batch,
            labelled=not asked.unlabelled, dtype=str(backbone.dtype).removeprefix("torch."),
            conditions=f"{describe_machine(backbone.device)}, median of 7 rounds, fresh batches",
            dense=dense, top1=search.reference.top1, tried=tuple(self.state.trials.values()),
            expected=search.expected(), rows=rows, folder=asked.folder,
        )  # fmt: skip

    def _given(self, images: torch.Tensor, dense: tuple[Speed, ...]) -> list[Speed]:
        """The dense model in the precision that it was given in, timed in turns with the other."""
        given, batch = self.dense, self.asked.batch
        (row,) = bench(given, [], images.to(given.dtype), batch=batch, rounds=1)
        other, fresh = self._opened(dense[0].dtype), fresh_batches(images, batch)
        runs: dict[str, Run] = {"given": lambda x: given(x.to(given.dtype)), "other": other}
        passes = max(1, math.ceil(row.images_per_s / batch / 4))
        with torch.inference_mode():
            other(next(fresh))
            took = in_turns(runs, fresh, 5, passes, given.device)
        low, middle, high = (
            dense[0].speedup * float(q)
            for q in np.quantile(took["other"] / took["given"], (0.25, 0.5, 0.75))
        )
        rate = dense[0].images_per_s * middle / dense[0].speedup
        return [replace(row, images_per_s=rate, speedup=middle, speedup_q25=low, speedup_q75=high)]

    def _rows(
        self,
        search: Search,
        finalists: list[Candidate],
        speeds: list[Speed],
        reference: Reference,
    ) -> tuple[Row, ...]:
        """Verify the finalists, in the order of the ladder."""
        seen, expected = self.state.verified, search.expected()
        for each in finalists:
            known = seen.get(each.what, Trial(each.what))
            if isinstance(each, OnnxCandidate):
                found = reference.extend_run(known, each.model, len(reference))
            else:
                assert isinstance(each, MethodCandidate)
                found = reference.extend(known, each, len(reference), None)
            seen[each.what] = found
            self.state.save()
        ladder = [seen[each.what] for each in finalists]
        rows = []
        for trial, sure in zip(ladder, certify(ladder, self.asked.budget), strict=True):
            own = [row for row in speeds if row.what == trial.what]
            fastest = max(own, key=lambda row: row.images_per_s)
            bound = bound_of(trial, sure, len(ladder))
            chosen = self.state.trials[trial.what]
            rows.append(Row(chosen, expected[trial.what], fastest, trial, sure, bound))
        return tuple(rows)

    def _write(self, tuned: Tuned, best: list[MethodCandidate], forms: OnnxForms | None) -> None:
        """Write tables and picture, and the recommended model."""
        row, folder, export = tuned.recommended, self.asked.folder, self.asked.export
        if folder is not None:
            write_bytes(folder / "tune.md", tuned.as_markdown().encode())
            write_json(folder / "tune.json", tuned.to_dict())
            write_bytes(folder / "tune.png", picture(tuned))
            print(f"tune.md, tune.json and tune.png are in {folder}")
        if row is None:
            if folder is not None:
                forget_model(folder)
            if export is not None:
                print(f"{export} is not written: nothing is recommended")
            return
        measured, onnx = tuned.measured(row), forms.found.get(row.what) if forms else None
        method = onnx.method if onnx else next(each for each in best if each.what == row.what)
        if folder is not None:
            save_model(method, folder, self.verifying, measured)
            print(f"the model is in {folder}: tokenenv.load_compressed('{folder}')")
            export = export or (folder / MODEL if onnx else None)
        if export is not None:
            images = self.source.batch(torch.arange(min(len(self.source), 64))).images
            onnx = onnx or OnnxForm.of(method, self.dense, self.asked.batch, images)
            onnx.write(export, measured)
            print(f"{export} is the model in float32: tokenenv.load_onnx('{export}')")
