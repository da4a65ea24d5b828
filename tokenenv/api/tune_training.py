"""The policy that ``tune`` trains: for one model, at one batch size, on this machine's clock."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from agents.policies import POLICY
from agents.training import train
from agents.training.trainer import CHECKPOINT
from tokenenv.data import ImageSource
from tokenenv.errors import UserError
from tokenenv.measure.candidate import MethodCandidate
from tokenenv.measure.opening import Model
from tokenenv.tuning.search import Search

SYSTEM = "dora"
"""What is trained: of the systems with predicted time, the one that loses least on photographs."""

_MANY = 100_000
"""More updates than fit into the time."""


def train_policy(
    model: Model,
    data: str | None,
    search: Search,
    best: Sequence[MethodCandidate],
    choosing: ImageSource,
    *,
    seconds: float,
    seed: int,
    out: Path,
) -> Path:
    """Train a policy on the choosing images of a folder, or on the training part of other data.

    It decides in the blocks of the candidate that is fastest among those expected to stay within
    the budget, and aims at what that saves on the clock.

    Returns:
        The run folder; a run that was stopped goes on, a finished one is taken as it is.

    Raises:
        UserError: no candidate is within the budget, so that there is no saving to aim at, or the
            policy doesn't fit the model.
    """
    if (out / POLICY).is_file():
        return out
    expected, trials = search.expected(), search.state.trials
    within = [
        each
        for each in best
        if each.method.reduction.blocks
        and expected[each.what] <= search.budget
        and trials[each.what].speed > 1.05
    ]
    if not within:
        raise UserError("no method was found within the budget whose saving it could aim at")
    model_of = max(within, key=lambda each: trials[each.what].speed)
    blocks = model_of.method.reduction.blocks
    saving = 100 * (1 - 1 / trials[model_of.what].speed)
    print(f"training {SYSTEM} in blocks {'/'.join(map(str, blocks))} for {saving:.0f} % less time")
    with _training_data(data, choosing) as images:
        run = train(
            SYSTEM, model=model.name, weights=model.weights, data=images, out=out, seed=seed,
            device=model.device, dtype=str(search.backbone.dtype).removeprefix("torch."),
            preprocessing=model.preprocessing, resume=(out / CHECKPOINT).is_file(), cost="time",
            cost_batch=search.batch, blocks=blocks, target_saving=round(saving, 1), updates=_MANY,
            minutes=seconds / 60,
        )  # fmt: skip
    if run.stopped:
        raise KeyboardInterrupt
    return out


@contextlib.contextmanager
def _training_data(data: str | None, choosing: ImageSource) -> Iterator[Any]:
    """What to train on: a folder of links to the choosing images, or data with a training part."""
    if data is None or not os.path.isdir(data) or os.path.isdir(Path(data, "train")):
        yield data
        return
    with TemporaryDirectory() as place:
        root = Path(place, "choosing")
        for folder in Path(data).iterdir():  # which classes there are says what labels mean
            if folder.is_dir():
                (root / folder.name).mkdir(parents=True)
        for file in choosing.files:
            link = root / file
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(Path(data, file).resolve())
        yield str(root)
