"""The times of a model's parts and of a method's decisions, and which decisions pay."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from tokenenv.api.opening import open_candidates
from tokenenv.data import Preprocessing
from tokenenv.errors import UserError, check_keywords
from tokenenv.game.break_even import BreakEven, break_even
from tokenenv.game.checks import MOST_IMAGES, check_whole
from tokenenv.game.latency import TimeCost, time_cost
from tokenenv.measure.candidate import Candidate, MethodCandidate
from tokenenv.measure.opening import named_model


@dataclass(frozen=True, repr=False)
class Latency:
    """Predicted times of a method on a model, on this machine at one batch size.

    Attributes:
        what: the method, as it was named.
        cost: predicts the time of any number of tokens, see
            :class:`~tokenenv.game.latency.TimeCost`.
        decisions: each decision at the most tokens that the method left before it: what it takes,
            and from when on it pays.
    """

    what: str
    cost: TimeCost
    decisions: tuple[BreakEven, ...]

    def paying_blocks(self, removed: float) -> tuple[int, ...]:
        """The blocks whose decision pays if it removes ``removed`` tokens."""
        return tuple(each.block for each in self.decisions if each.pays(removed))

    def __repr__(self) -> str:
        key = self.cost.table.key
        lines = [
            f"{self.what} on {key['model']}, {key['dtype']}, batch size {key['batch']}: "
            f"{key['machine']}",
            f"the dense model takes {1e3 * self.cost.dense():.3f} ms per image",
        ]
        for each in self.decisions:
            start = (
                f"a decision in block {each.block} on {each.tokens} tokens takes "
                f"{each.decision_ms:.3f} ms"
            )
            if not each.decision_ms:
                lines.append(f"the decision in block {each.block} is left out: it changes nothing")
            elif each.least is None:
                lines.append(f"{start} and never pays")
            else:
                lines.append(f"{start} and pays from {each.least} tokens removed on")
        return "\n".join(lines)


@check_keywords
def latency_table(
    what: Any,
    *,
    model: str | None = None,
    weights: str | os.PathLike[str] | None = None,
    batch: int = 1,
    seconds: float = 15.0,
    device: str = "cpu",
    dtype: str = "float32",
    preprocessing: Preprocessing | None = None,
    trust: bool = False,
) -> Latency:
    """Time a model's parts and a method's decisions; tell from when on each decision pays.

    The model's parts are kept in the user's cache folder (or ``TOKENENV_CACHE``) and measured again
    on another machine, with another version of torch or another number of threads.

    Args:
        what: the method, as for :func:`tokenenv.evaluate`.
        model: timm's name of the model; None: the one ``what`` was trained on, else ``digits_vit``.
        weights: as for :func:`tokenenv.evaluate`.
        batch: images per forward pass.
        seconds: time to spend on each of the two measurements, about.
        device: ``"cpu"``, ``"cuda"`` ...
        dtype: precision of the model.
        preprocessing: replaces that of the run or the model that ``what`` names, or timm's.
        trust: whether to run third-party code that a saved method names.

    Raises:
        UserError: an argument is wrong; the message names it and the remedy.
    """
    opened = open_candidates(
        [what], named_model(model, weights, device, dtype, preprocessing), images=False, trust=trust
    )
    (candidate,) = opened.candidates
    cost = cost_of(candidate, batch, seconds)
    assert isinstance(candidate, MethodCandidate)
    found = break_even(cost, candidate.method.reduction)
    return Latency(candidate.what, cost, tuple(found))


def cost_of(candidate: Candidate, batch: int, seconds: float = 15.0) -> TimeCost:
    """The predicted times of a candidate.

    Raises:
        UserError: it is a model that reduces its own tokens, or a batch size out of range.
    """
    check_whole("batch", batch, 1, MOST_IMAGES + 1)
    if not isinstance(candidate, MethodCandidate):
        raise UserError(
            f"'{candidate.what}' is a model that reduces its own tokens, whose time is not "
            "predicted: take tokenenv bench"
        )
    return time_cost(candidate.backbone, candidate.method, batch, budget=seconds)
