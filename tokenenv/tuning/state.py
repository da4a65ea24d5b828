"""What a search has found so far, in its folder: one JSON file, written atomically."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_type_hints

from tokenenv.artefact import Unfit, Within, check_fields, read_object
from tokenenv.errors import UserError
from tokenenv.storage import write_json
from tokenenv.tuning.trials import Trial
from tokenenv.vit.load import DTYPES

STATE = "search.json"
"""Its name."""

_REMEDY = "restore it, or give a new --out"
_WITHIN: dict[Any, Any] = {int: Within(0, 2**53), float: Within(0.0, 1e12)}
_TRIAL = {name: _WITHIN.get(kind, kind) for name, kind in get_type_hints(Trial).items()}
_FOUND = {
    "dtype": Literal[DTYPES] | None,
    "rates": list[str] | None,
    "runtime": Literal["torch", "onnx", "both"] | None,
}
_KINDS = {"conditions": dict, "trials": list[dict], "verified": list[dict], "found": dict}


class State:
    """The trials of a search, and lists of names that took long to find.

    Args:
        folder: of the search; None: nothing is written.
        conditions: what all trials depend on, as JSON.

    Attributes:
        trials: on the choosing images, by candidate.
        verified: on the verifying images, by candidate.
        found: JSON values by name.

    Raises:
        UserError: the folder holds a search under other conditions, or a damaged file.
    """

    def __init__(self, folder: Path | None, conditions: dict[str, Any]) -> None:
        self._path = None if folder is None else folder / STATE
        self._conditions = conditions
        self.trials: dict[str, Trial] = {}
        self.verified: dict[str, Trial] = {}
        self.found: dict[str, Any] = {}
        if self._path is not None and self._path.exists():
            self._read(self._path)

    def _read(self, path: Path) -> None:
        said = read_object(path, _KINDS, _REMEDY)
        for key, value in self._conditions.items():
            if said["conditions"].get(key) != value:
                raise UserError(
                    f"the search in '{path.parent}' has {key} '{said['conditions'].get(key)}', not "
                    f"'{value}': give what it was started with, or a new --out"
                )
        try:
            for name, trials in (("trials", self.trials), ("verified", self.verified)):
                for fields in said[name]:
                    check_fields(fields, _TRIAL, closed=True)
                    trials[fields["what"]] = _consistent(Trial(**fields))
            check_fields(said["found"], _FOUND, closed=True)
        except Unfit as error:
            raise UserError(f"cannot read '{path}' ({error}): {_REMEDY}") from None
        self.found = said["found"]

    def save(self) -> None:
        """Write everything."""
        if self._path is None:
            return
        trials, verified = (
            [trial.to_dict() for trial in known.values()] for known in (self.trials, self.verified)
        )
        write_json(
            self._path,
            {
                "conditions": self._conditions,
                "trials": trials,
                "verified": verified,
                "found": self.found,
            },
        )


def _consistent(trial: Trial) -> Trial:
    if max(trial.agree, trial.wins + trial.losses) > trial.images:
        raise Unfit(f"'{trial.what:.40}' counts more images than the {trial.images} it ran on")
    return trial
