"""The picture of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot_history(path: Path, history: list[dict[str, Any]], target_drop: float) -> None:
    """Draw reward, tokens kept, and the held-back images' drop and saving over the updates.

    Args:
        path: PNG to write.
        history: rows of :class:`agents.training.Trainer`.
        target_drop: percentage points, drawn as a line.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rollouts = [row for row in history if "reward" in row]
    judged = [row for row in history if "saving" in row]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), constrained_layout=True)
    for axis, key, title in (
        (axes[0], "reward", "reward per agent and episode"),
        (axes[1], "keep", "share of decisions that keep"),
    ):
        axis.plot([r["update"] for r in rollouts], [r[key] for r in rollouts], lw=1.2)
        axis.set(title=title, xlabel="update")
        axis.grid(alpha=0.3)
    updates = [r["update"] for r in judged]
    axes[2].plot(updates, [r["saving"] for r in judged], "C2.-", label="MACs saved, %")
    axes[2].set(title="deterministic policy, held-back images", xlabel="update")
    axes[2].set_ylabel("MACs saved, %", color="C2")
    right = axes[2].twinx()
    right.plot(updates, [r["drop"] for r in judged], "C3.-", label="top-1 lost, pp")
    right.axhline(target_drop, color="C3", ls=":", lw=1)
    right.set_ylabel("top-1 lost, pp (dotted: target)", color="C3")
    axes[2].grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
