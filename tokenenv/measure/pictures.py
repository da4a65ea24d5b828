"""The picture that ``tokenenv bench`` draws of speed-ups."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from tokenenv.game.figures import line_colour, new_figure, png
from tokenenv.measure.speed import DENSE, Speed


def speed_picture(rows: Sequence[Speed], model: str) -> bytes:
    """Draw a PNG of speed-up over multiply-adds saved, with the limit set by the token counts.

    Args:
        rows: all batch sizes; the dense model's rows are not drawn.
        model: name of the dense model, for the titles; each precision gets a panel.
    """
    kinds = sorted({(row.dtype, row.batch) for row in rows}, reverse=True)
    precisions = list(dict.fromkeys(dtype for dtype, _ in kinds))
    figure = new_figure(3 + 5.5 * len(precisions), 5)
    axes = figure.subplots(1, len(precisions), sharey=True, squeeze=False)[0]
    names = list(dict.fromkeys(row.name for row in rows if row.what != DENSE))
    marks = dict(zip(names, itertools.cycle("os^Dv*XP")))
    batches = sorted({row.batch for row in rows})
    for axis, dtype in zip(axes, precisions, strict=True):
        for row in rows:
            if row.what == DENSE or row.dtype != dtype:
                continue
            colour, saved = line_colour(batches.index(row.batch)), row.saved
            if row.slice_speedup is not None:
                axis.plot([saved, saved], [row.speedup, row.slice_speedup], ":", color=colour, lw=1)
                axis.plot(saved, row.slice_speedup, "_", color=colour, ms=14, mew=2)
            spread = [[row.speedup - row.speedup_q25], [row.speedup_q75 - row.speedup]]
            axis.errorbar(saved, row.speedup, spread, fmt=marks[row.name], color=colour, ms=6)
        axis.axhline(1, color="0.4", lw=1)
        axis.set_xlabel("multiply-adds saved, policy included, %")
        axis.set_title(f"{model}, {dtype}", fontsize=10)
        axis.grid(alpha=0.3)
    last = axes[-1]
    for number, batch in enumerate(batches):
        last.plot([], [], color=line_colour(number), lw=4, label=f"batch {batch}")
    last.plot([], [], "_", color="0.3", ms=14, mew=2, label="limit: the model sliced")
    for name in names:
        last.plot([], [], marks[name], color="0.3", ms=6, label=name)
    axes[0].set_ylabel("speed-up over the dense model, fresh batches")
    figure.suptitle("median and quartiles of ratios within a round", fontsize=10)
    figure.legend(loc="outside right upper", fontsize=8)
    return png(figure)
