"""Which of the methods that a user named differ in nothing but the seed."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from agents.policies.words import folder_of, split_name
from agents.training.run import CONFIG
from tokenenv.artefact import read_object
from tokenenv.errors import UserError
from tokenenv.words import split_outside


def series_of(whats: Sequence[str]) -> dict[str, str]:
    """The series that each method belongs to, by its name; in one are those equal but for the seed.

    Of a run everything counts that its config says, and what is set behind the folder's name; a
    series of runs is named by the start of their names. Of a word its arguments count without
    ``seed=``, which name the series.

    Raises:
        UserError: no two of them differ in the seed alone.
    """
    groups: dict[str, list[str]] = {}
    for what in whats:
        groups.setdefault(_without_seed(what), []).append(what)
    if len(groups) == len(whats):
        raise UserError(
            "no two of the methods differ in their seed alone: name runs of several seeds, or "
            "leave --seeds out"
        )
    found: dict[str, str] = {}
    for key, group in groups.items():
        name = _start(group) if key.startswith("{") else key
        taken = set(found.values())
        while name in taken:
            name += "'"
        found |= dict.fromkeys(group, name)
    return found


def _without_seed(what: str) -> str:
    """JSON of a run's config, or the word without its seed."""
    folder, (name, more) = folder_of(what), split_name(what)
    if folder is not None and (folder / CONFIG).is_file():
        config = read_object(folder / CONFIG, {}, "restore it")
        config.pop("seed", None)
        return json.dumps({"config": config, "set": more}, sort_keys=True)
    kept = [part for part in split_outside(more, ",") if part and not part.startswith("seed=")]
    return ":".join([name, ",".join(kept)]).rstrip(":")


def _start(whats: Sequence[str]) -> str:
    """What names start with, such as ``runs/dora`` of ``runs/dora-0`` and ``runs/dora-1``."""
    shared = os.path.commonprefix(whats)  # noqa: RUF071  (characters, not folders)
    return shared.rstrip("-_0123456789") or whats[0]
