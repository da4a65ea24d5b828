"""The picture ``curve.png`` of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenenv.game.figures import new_figure, png
from tokenenv.storage import write_bytes

CURVE = "curve.png"
"""Its name in a run folder."""

_TITLES = {"reward": "reward per agent and episode", "loss": "loss"}
_KEPT = {"reward": "decisions that keep, %", "loss": "tokens left at the end, %"}


def plot_history(
    path: Path, history: list[dict[str, Any]], target_saving: float | None, shown: str = "reward"
) -> None:
    """Draw reward or loss, tokens kept, and saving and drop on held-back images, over the updates.

    Args:
        path: PNG to write.
        history: rows of :class:`agents.training.trainer.Trainer`.
        target_saving: percent, drawn as a line; None: no target.
        shown: ``reward`` or ``loss``, the quantity that the updates optimise.
    """
    from matplotlib.ticker import MaxNLocator

    rollouts = [row for row in history if "keep" in row]
    judged = [row for row in history if "saving" in row]
    figure = new_figure(9.5, 5.6)
    axes = figure.subplots(2, 2, sharex=True)
    for axis, rows, key, factor, style, title in (
        (axes[0, 0], rollouts, shown, 1, "C0-", f"training: {_TITLES[shown]}"),
        (axes[0, 1], rollouts, "keep", 100, "C0-", f"training: {_KEPT[shown]}"),
        (axes[1, 0], judged, "saving", 1, "C2.-", "held-back images: MACs saved, %"),
        (axes[1, 1], judged, "drop", 1, "C3.-", "held-back images: top-1 lost, points"),
    ):
        axis.plot([r["update"] for r in rows], [factor * r[key] for r in rows], style, lw=1.2)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if target_saving is not None:
        axes[1, 0].axhline(target_saving, color="0.4", ls="--", lw=1, label="wanted")
        axes[1, 0].legend(fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("update")
    write_bytes(path, png(figure))
