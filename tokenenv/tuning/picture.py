"""The picture of a search: time against the top-1 that is lost."""

from __future__ import annotations

from tokenenv.game.figures import line_colour, new_figure, png
from tokenenv.tuning.result import Tuned


def picture(tuned: Tuned) -> bytes:
    """Draw a PNG of milliseconds per image against points lost.

    Grey points: candidates on all choosing images, at the loss expected from their divergence.
    Marks: the verified ones, at their loss on the verifying images, with the bound above; the
    legend names them. The star is the fastest dense form, the line the budget.
    """
    figure = new_figure(9.5, 5)
    axis = figure.subplots()
    dense = max(tuned.dense, key=lambda row: row.images_per_s)
    verified = {row.what for row in tuned.rows}
    points = [
        (1e3 / dense.images_per_s / trial.speed, tuned.expected[trial.what])
        for trial in tuned.tried
        if trial.what in tuned.expected and trial.what not in verified
    ]
    if points:
        axis.plot(*zip(*points, strict=True), "o", color="0.7", ms=4, label="tried")
    best, second = tuned.recommended, tuned.runner_up
    for number, row in enumerate(tuned.rows):
        lost, time = row.verified.pairs.lost, 1e3 / row.speed.images_per_s
        reach = [[0.0], [max(row.bound - lost, 0.0)]]
        role = " (recommended)" if row is best else " (runner-up)" if row is second else ""
        axis.errorbar(
            time, lost, reach, fmt="os^Dv*XP"[number % 8], color=line_colour(number), capsize=3,
            ms=9 if row is best else 6, label=f"{_short(row.speed.name)}{role}",
        )  # fmt: skip
    axis.plot(1e3 / dense.images_per_s, 0, "*", color="k", ms=15, label=f"{dense.name}")
    axis.axhline(tuned.budget, color="0.4", lw=1, ls=":", label=f"budget: {tuned.budget:g} points")
    axis.set_xlabel(f"ms per image at batch {tuned.batch}, {tuned.dtype}; less is better")
    measure = "top-1" if tuned.labelled else "predictions changed"
    axis.set_ylabel(f"{measure} lost, points, with the 95 % bound")
    axis.margins(x=0.08)
    axis.set_xlim(left=0)
    axis.grid(alpha=0.3)
    axis.set_title(f"{tuned.model}, {tuned.data}", fontsize=10)
    figure.legend(loc="outside right upper", fontsize=8)
    return png(figure)


def _short(name: str) -> str:
    return name if len(name) <= 48 else f"{name[:45]}..."
