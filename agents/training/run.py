"""A finished training run, as its folder holds it."""

from __future__ import annotations

import html
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from agents.policies import POLICY, load_policy
from tokenenv.artefact import Unfit, Within, check_fields, read_json
from tokenenv.errors import UserError
from tokenenv.paths import as_path

MODEL = "model.safetensors"
"""Weights of a fine-tuned backbone; a run with a frozen backbone has no such file."""
CONFIG, REPORT = "config.json", "report.json"


@dataclass(frozen=True, repr=False)
class Run:
    """A training run and its results.

    Attributes:
        folder: the run folder.
        config: system, model, images, seed, settings and versions, as in ``config.json``.
        report: accuracy, cost and history, as in ``report.json``. If several processes trained
            together, only the first one has it.
        trust: whether a user's own code that the policy's file names may be run.
    """

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    trust: bool = False

    @classmethod
    def open(cls, folder: str | os.PathLike[str], trust: bool = False) -> Run:
        """Read the run that was written to ``folder``; ``trust`` as above.

        Raises:
            UserError: there is none, it has not been reported on yet, or a file of it is damaged.
        """
        path = as_path(folder, "folder")
        config, report = (_read(path, name) for name in (CONFIG, REPORT))
        for name, found, kinds in ((CONFIG, config, _SAID), (REPORT, report, _REPORTED)):
            missing = [key for key in kinds if key not in found]
            if missing:
                raise UserError(
                    f"'{path / name}' doesn't say {', '.join(missing)}: it is not a run's, restore "
                    "it or train again"
                )
            try:
                check_fields(found, kinds)
            except Unfit as error:
                raise UserError(
                    f"cannot read '{path / name}' ({error}): restore it or train again"
                ) from None
        return cls(path, config, report, trust)

    @property
    def stopped(self) -> bool:
        """Whether Ctrl-C or SIGTERM ended the training early; ``resume`` continues it."""
        return bool(self.report.get("stopped_early"))

    @cached_property
    def policy(self) -> Any:
        """The trained policy, on the CPU; None of a model with LTM blocks, which has none."""
        path = self.folder / POLICY
        return load_policy(path, self.trust) if path.is_file() else None

    def to_dict(self) -> dict[str, Any]:
        """Folder, config, report and whether it was stopped, as JSON."""
        return {
            "folder": str(self.folder),
            "config": self.config,
            "report": self.report,
            "stopped": self.stopped,
        }

    def __repr__(self) -> str:
        words = ", ".join(f"{name} {value}" for name, value in self._table())
        system, model = (self.config.get(key, "?") for key in ("system", "model"))
        return f"<Run {self.folder}: {system} on {model}{', ' if words else ''}{words}>"

    def _repr_html_(self) -> str:
        system, model = (html.escape(str(self.config.get(k, "?"))) for k in ("system", "model"))
        rows = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in self._table())
        return (
            f"<table><caption>{system} on {model}, {html.escape(str(self.folder))}</caption>"
            f"{rows}</table>"
        )

    def _table(self) -> list[tuple[str, str]]:
        """Names and values of the main numbers; empty without a report."""
        r = self.report
        if not r:
            return []
        saved = 1 - r["gmacs"] / r["gmacs_dense"]
        rows = [
            ("top-1", f"{r['top1']:.2f} %"),
            ("dense top-1", f"{r['top1_dense']:.2f} %"),
            ("GMACs saved", f"{100 * saved:.1f} %"),
            ("training", f"{r['training_seconds']:.1f} s"),
        ]
        return [*rows, ("stopped after", f"{r['updates']} updates")] if self.stopped else rows


_SAID = {"system": str, "model": str, "seed": int}
_REPORTED: dict[str, Any] = {
    **dict.fromkeys(("top1", "top1_dense", "gmacs", "training_seconds"), float),
    "gmacs_dense": Within(1e-12, 1e12),
    "updates": int,
}


def _read(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.exists():
        raise UserError(
            f"'{folder}' holds no finished run, there is no {name}: give the folder of one, or go "
            "on with an unfinished one by resume=True (--resume)"
        )
    found = read_json(path, "restore it or train again")
    if not isinstance(found, dict):
        raise UserError(f"'{path}' is not a run's: restore it or train again")
    return found
