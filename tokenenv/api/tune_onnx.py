"""The best methods of a search in ONNX Runtime, beside the dense model there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tokenenv.api.compress import counted
from tokenenv.deploy.candidate import RUNTIME, OnnxCandidate
from tokenenv.deploy.compressed import CompressedViT
from tokenenv.deploy.compressed import compress as compress_model
from tokenenv.deploy.onnx import (
    Show,
    check_export,
    dense_onnx,
    graph_bytes,
    takes_batches,
    with_description,
)
from tokenenv.deploy.runtime import OnnxModel
from tokenenv.errors import UserError, check_choice
from tokenenv.game.episode import Execution
from tokenenv.game.policy import lengths_known
from tokenenv.measure.candidate import Candidate, MethodCandidate, Run
from tokenenv.measure.speed import DENSE, fresh_batches, in_turns, pool_size
from tokenenv.storage import write_bytes
from tokenenv.tuning.search import Search
from tokenenv.tuning.state import State
from tokenenv.tuning.trials import Reference, Trial
from tokenenv.vit.backbone import Backbone

Runtime = Literal["torch", "onnx", "auto"]
"""What candidates run in; ``auto``: what runs the dense model faster, or both."""

APART = 1.5
"""With ``auto`` a runtime is left out if the other runs the dense model so much faster."""

EXPORTED = 6
"""Methods that are exported; one takes tens of seconds."""

_ROUNDS = 5


def check_runtime(runtime: str, device: str, dtype: str | None, export: bool) -> None:
    """See that candidates can run in a runtime, and that the best can be exported if it shall be.

    Raises:
        UserError: it is unknown, a package is missing, or it doesn't run there or in ``dtype``.
    """
    check_choice("runtime", runtime, Runtime)
    if runtime != "torch" or export:
        check_export()
    if runtime != "torch" and device != "cpu":
        raise UserError(
            f"runtime='{runtime}' measures ONNX Runtime on the CPU, not on '{device}': leave the "
            "device out, or take runtime='torch'"
        )
    if runtime == "onnx" and dtype not in (None, "float32"):
        raise UserError(f"ONNX files are in float32, not {dtype}: leave dtype out")


@dataclass(frozen=True)
class OnnxForm:
    """A method in ONNX Runtime.

    Attributes:
        method: the method on the model in float32.
        fast: the two as one module, which says what it computes.
        graph: the file's content, without description.
        exported: the dense model in ONNX Runtime, if that is there already.
    """

    method: MethodCandidate
    fast: CompressedViT
    graph: bytes
    exported: OnnxModel | None = None

    @staticmethod
    def of(
        each: MethodCandidate,
        dense: Backbone,
        batch: int,
        images: Tensor,
        show: Show = lambda step: print(f"exporting: {step} ...", flush=True),
    ) -> OnnxForm:
        """Export a method.

        Args:
            each: the method, on a model in any precision.
            dense: that model in float32.
            batch: images per pass; of several images of unlike length the shorter are padded.
            images: what is computed is counted on; ``(B, C, H, W)``.
            show: called with each step, in words.

        Raises:
            UserError: it can't be exported.
        """
        known = lengths_known(dense, each.method)
        execution: Execution | None = "padded" if batch > 1 and not known else None
        fast = compress_model(dense.model, each.method, execution)
        graph = graph_bytes(fast, show)
        fast.method, fast.measured = each.what, counted(fast, images.to(dense.device))
        return OnnxForm(replace(each, backbone=dense), fast, graph)

    @property
    def what(self) -> str:
        """The candidate's name."""
        return f"{self.method.what} through {RUNTIME}"

    @cached_property
    def candidate(self) -> OnnxCandidate:
        """What is timed and verified."""
        said = {"measured": self.fast.measured}
        model = OnnxModel(self.graph, batched=takes_batches(self.fast), said=said)
        what, dense = self.what, self.method.backbone
        return OnnxCandidate(what, model, dense, key=what, group=what, exported=self.exported)

    def write(self, path: Path, measured: dict[str, Any]) -> None:
        """Write the file, which says what was ``measured``."""
        self.fast.measured = self.fast.measured | measured
        write_bytes(path, with_description(self.fast, self.graph))


class OnnxForms:
    """The dense model in ONNX Runtime, and methods that follow it there.

    Args:
        dense: the dense model, in float32.
        backbone: the dense model in torch, in its fastest precision.
        reference: what it says of the choosing images.
        batch: images per pass on the clock.

    Attributes:
        exported: the dense model in ONNX Runtime.
        lead: how much faster it is there than ``backbone``.
        alone: whether methods are tried there alone, and not in torch.
        found: the methods that were exported, by their names.

    Raises:
        UserError: torch can't export the dense model.
    """

    def __init__(
        self, dense: Backbone, backbone: Backbone, reference: Reference, batch: int
    ) -> None:
        print("exporting the dense model to ONNX", flush=True)
        self._dense, self._reference, self._batch = dense, reference, batch
        self.exported = dense_onnx(dense.model)
        self.lead = self._speedups(backbone, {RUNTIME: self.exported})[RUNTIME]
        self.alone, self.found = False, dict[str, OnnxForm]()

    def add(self, search: Search, best: Sequence[MethodCandidate]) -> list[Candidate]:
        """Export the best methods; time each, and try it on all choosing images.

        Their trials are added to those of the search.

        Returns:
            All candidates that are faster than the dense model in both runtimes, or else the
            fastest one.
        """
        self._export(self._picked(search, best))
        if not self.alone:
            search.time(best)
        runs: dict[str, Run] = {what: form.candidate.model for what, form in self.found.items()}
        speedups, trials = self._speedups(search.backbone, runs), search.state.trials
        for what, form in self.found.items():
            trial = trials.get(what, Trial(what))
            trial = self._reference.extend_run(trial, form.candidate.model, len(self._reference))
            limit = trials[form.method.what].limit
            trials[what] = replace(trial, speedup=speedups[what], limit=limit)
            search.state.save()
        every: list[Candidate] = [] if self.alone else [*best]
        every += [form.candidate for form in self.found.values()]
        every.sort(key=lambda each: -trials[each.what].speed)
        faster = [each for each in every if trials[each.what].speed > max(1.0, self.lead)]
        return faster or every[:1]

    def _export(self, picked: Sequence[MethodCandidate]) -> None:
        print(f"exporting {len(picked)} of the methods to ONNX", flush=True)
        with tqdm(total=len(picked), desc="ONNX", unit="method", leave=False, disable=None) as bar:
            for each in picked:
                try:
                    form = self._form(each, bar.set_postfix_str)
                    self.found[form.what] = form
                except UserError as error:
                    bar.clear()
                    print(f"'{each.what}' is not tried in ONNX Runtime: {error}")
                bar.update()

    def _picked(self, search: Search, best: Sequence[MethodCandidate]) -> list[MethodCandidate]:
        """The fastest that are expected to stay within the budget, one of a kind.

        What decisions take in ONNX Runtime is not known before, and torch's clock does not tell. It
        is alike for methods of the same kind with as many decisions; the table of times, which
        leaves decisions out, tells the fastest of these.
        """
        expected, trials = search.expected(), search.state.trials
        within = [
            each
            for each in best
            if expected[each.what] <= search.budget and trials[each.what].limit > 1
        ]
        kinds: dict[tuple[str, int], MethodCandidate] = {}
        for each in sorted(within, key=lambda each: -trials[each.what].limit):
            kinds.setdefault((each.group, len(each.method.reduction.blocks)), each)
        return list(kinds.values())[:EXPORTED]

    def _form(self, each: MethodCandidate, show: Show) -> OnnxForm:
        images = self._reference.images(64)
        form = OnnxForm.of(each, self._dense, self._batch, images, show)
        return replace(form, exported=self.exported)

    def _speedups(self, backbone: Backbone, runs: dict[str, Run]) -> dict[str, float]:
        """Speed over the dense model in torch, in turns."""
        images = self._reference.images(pool_size(self._batch)).to(backbone.dtype)
        fresh = fresh_batches(images, self._batch)
        every: dict[str, Run] = {DENSE: backbone, **runs}
        with torch.inference_mode():
            for run in every.values():
                run(next(fresh))
            passes = max(1, 16 // self._batch)
            took = in_turns(every, fresh, _ROUNDS, passes, backbone.device)
        return {what: float(np.median(took[DENSE] / took[what])) for what in runs}


def open_forms(
    runtime: str,
    state: State,
    dense: Backbone,
    backbone: Backbone,
    reference: Reference,
    batch: int,
) -> OnnxForms | None:
    """What is tried in ONNX Runtime; None for nothing.

    ``runtime`` as for :func:`tokenenv.tune`, other arguments as for :class:`OnnxForms`.
    """
    if runtime == "torch":
        return None
    forms, found = OnnxForms(dense, backbone, reference, batch), state.found
    if "runtime" not in found:
        lead = forms.lead
        found["runtime"] = "onnx" if lead > APART else "torch" if lead < 1 / APART else "both"
        if runtime == "onnx":
            found["runtime"] = "onnx"
        state.save()
    words = {"onnx": "ONNX Runtime alone", "torch": "torch alone", "both": "both"}
    dtype = str(backbone.dtype).removeprefix("torch.")
    print(
        f"the dense model in ONNX Runtime is {forms.lead:.2f} x as fast as in torch ({dtype}): "
        f"methods are tried in {words[found['runtime']]}"
    )
    forms.alone = found["runtime"] == "onnx"
    return None if found["runtime"] == "torch" else forms
