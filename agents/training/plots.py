"""The picture ``curve.png`` of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agents.training.judgement import Judgement
from tokenenv.game.figures import PALETTE, new_figure, png
from tokenenv.storage import write_bytes

CURVE = "curve.png"
"""Its name in a run folder."""

_NAMES = {"reward": "reward per agent and episode", "loss": "loss"}
_KEPT = {"reward": "decisions that keep, %", "loss": "tokens left at the end, %"}
_START = "untrained, at the final saving"
_LOST = "top-1 lost, points"


def plot_history(
    path: Path,
    history: list[dict[str, Any]],
    target_saving: float | None,
    shown: str = "reward",
    title: str = "",
    untrained: Judgement | None = None,
    saved: str = "MACs",
) -> None:
    """Draw reward or loss, tokens kept, and saving and drop on held-back images, over the updates.

    Args:
        path: PNG to write.
        history: rows of :class:`agents.training.trainer.Trainer`.
        target_saving: percent, drawn as a line; None: no target.
        shown: ``reward`` or ``loss``, the quantity that the updates optimise.
        title: above the picture.
        untrained: the untrained policy at the saving of the trained one, drawn as lines; None: it
            was not measured.
        saved: what is saved.
    """
    from matplotlib.ticker import MaxNLocator

    rollouts = [row for row in history if "keep" in row]
    judged = [row for row in history if "saving" in row]
    figure = new_figure(9.5, 5.8)
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(2, 2, sharex=True)
    for axis, rows, key, factor, where, label in (
        (axes[0, 0], rollouts, shown, 1, "training images", _NAMES[shown]),
        (axes[0, 1], rollouts, "keep", 100, "training images", _KEPT[shown]),
        (axes[1, 0], judged, "saving", 1, "held-back images", f"{saved} saved, %"),
        (axes[1, 1], judged, "drop", 1, "held-back images", _LOST),
    ):
        axis.plot(
            [row["update"] for row in rows], [factor * row[key] for row in rows],
            "-" if rows is rollouts else ".-", color=PALETTE[1], lw=1.2, label="policy in training",
        )  # fmt: skip
        axis.set_title(where, fontsize=10)
        axis.set_ylabel(label, fontsize=9)
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if target_saving is not None:
        axes[1, 0].axhline(target_saving, color="0.4", ls="--", lw=1, label="wanted")
    if untrained is not None:
        for axis, value in ((axes[1, 0], untrained.saving), (axes[1, 1], untrained.drop)):
            axis.axhline(value, color=PALETTE[2], ls=":", lw=1.5, label=_START)
    for axis in axes[1]:
        axis.set_xlabel("update")
        axis.legend(fontsize=8)
    write_bytes(path, png(figure))
