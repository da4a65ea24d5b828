"""What a page shows, as JSON: images with their episodes, methods with their results."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenenv.game.render import Pixels
from tokenenv.measure.comparison import Comparison, Row, pareto_front
from tokenenv.measure.episodes import Recorded, Step
from tokenenv.measure.speed import Speed
from tokenenv.measure.watching import Seen

PRUNED = 2**16 - 1
"""Number of the token of a pruned patch in :func:`owners_text`."""

CHANCES, NO_AGENT = 200, 255
"""Steps from probability 0 to 1, and the number for no agent, in :func:`chances_text`."""

_SMALL = 64  # pixels up to which an image is stored as it is
_QUALITY = 82
_GUESSES = 3


def page_of_comparison(comparison: Comparison) -> dict[str, Any]:
    """The data of a report: methods and classes, no images."""
    front = pareto_front(comparison.rows)
    rows = [_row(row, comparison.dense.top1, row in front) for row in comparison.rows]
    return {
        "title": f"{comparison.model} on {comparison.data}",
        "about": f"{comparison.dense.images} images of {comparison.data}",
        "model": comparison.model,
        "timing": comparison.timing,
        "rows": rows,
        "classes": [each.to_dict() for each in comparison.classes],
        "seeds": [each.to_dict() for each in comparison.seeds],
        "names": {},
        "methods": [],
        "images": [],
        "note": f"Multiply-adds: {comparison.counted}.",
        "tables": [],
        "notes": [],
    }


def page_of_exploration(
    comparison: Comparison, seen: Seen, labels: Sequence[int], files: Sequence[str], note: str
) -> dict[str, Any]:
    """The data of a page to explore: :func:`page_of_comparison` and some of the images.

    Args:
        comparison: methods on all images.
        seen: episodes on some of them.
        labels: true classes of those.
        files: their names.
        note: a line above them.
    """
    page = page_of_comparison(comparison)
    return page | _images(seen, labels, files) | {"note": f"{note} {page['note']}"}


def page_of_images(
    model: str, seen: Seen, labels: Sequence[int], files: Sequence[str], speeds: Sequence[Speed]
) -> dict[str, Any]:
    """The data of a page about single images, labelled or not.

    Args:
        model: name of the dense model.
        seen: the episodes.
        labels: true classes, below 0 where unknown.
        files: names of the images.
        speeds: measured times of the dense model and of the methods.
    """
    times = ", ".join(
        f"{speed.what} {1e3 / speed.images_per_s:.3g} ms" for speed in speeds if speed.what
    )
    number = f"{len(files)} image{'' if len(files) == 1 else 's'}"
    return {
        "title": f"{', '.join(seen.methods)} on {model}",
        "about": number,
        "model": model,
        "timing": "",
        "rows": [],
        "classes": [],
        "seeds": [],
        "tables": [],
        "notes": [],
        **_images(seen, labels, files),
        "note": f"Measured time of an image, one at a time: {times}." if speeds else "",
    }


def _row(row: Row, dense_top1: float, front: bool) -> dict[str, Any]:
    return {
        "what": row.what,
        "method": row.method,
        "frozen": row.frozen,
        "dense": row.reference,
        "top1": round(row.top1, 3),
        "low": round(max(dense_top1 - row.lost_high, 0.0), 3),
        "high": round(min(dense_top1 - row.lost_low, 100.0), 3),
        "change": [round(-v + 0.0, 3) for v in (row.lost, row.lost_high, row.lost_low)],
        "agreement": round(row.agreement, 3),
        "gmacs": _short(row.gmacs),
        "saved": round(row.saved, 3),
        "front": front,
        "times": [
            {"batch": s.batch, "ms": _short(1e3 / s.images_per_s), "speedup": _short(s.speedup)}
            for s in row.speeds
        ],
    }


def _images(seen: Seen, labels: Sequence[int], files: Sequence[str]) -> dict[str, Any]:
    """The parts of a page's data that are about its images."""
    images: list[dict[str, Any]] = [
        {
            "file": files[i],
            "label": int(labels[i]) if labels[i] >= 0 else None,
            "src": data_uri(seen.pixels[i]),
            "dense": _guesses(seen.dense[i]),
            "runs": [_run(method, i) for method in seen.methods.values()],
        }
        for i in range(len(files))
    ]
    named = {g[0] for image in images for g in image["dense"]}
    named |= {image["label"] for image in images if image["label"] is not None}
    named |= {g[0] for i in images for run in i["runs"] for step in run["guesses"] for g in step}
    methods = [
        {
            "what": what,
            "blocks": method.blocks,
            "between": method.between,
            "merges": method.merges,
            "reward": method.reward,
            "grid": list(method.grid),
            "gmacs": _short(method.dense_macs / 1e9),
        }
        for what, method in seen.methods.items()
    ]
    return {
        "names": {str(label): seen.names(label) for label in sorted(named)},
        "methods": methods,
        "images": images,
    }


def _run(method: Recorded, image: int) -> dict[str, Any]:
    """An episode: lists with an entry for each step, the time before the first decision first."""
    steps = method.steps
    chances = [step.chance for step in steps[1:] if step.chance is not None]
    return {
        "tokens": [int(step.tokens[image]) for step in steps],
        "gmacs": [_short(step.macs[image] / 1e9) for step in steps],
        "guesses": [_guesses(step.probabilities[image]) for step in steps],
        "owners": owners_text([step.owners[image] for step in steps]),
        "chances": chances_text([chance[image] for chance in chances]) if chances else None,
        "rewards": [_reward(step, image) for step in steps],
    }


def _reward(step: Step, image: int) -> float | str | None:
    """One number if all agents got the same, else text of a float32 for each patch."""
    if step.reward is None:
        return None
    values = step.reward[image]
    known = np.unique(values[~np.isnan(values)])
    if len(known) == 1:
        return _short(float(known[0]))
    return _text(values.astype("<f4"))


def _guesses(probabilities: NDArray[np.float32]) -> list[tuple[int, float]]:
    order = np.argsort(-probabilities, kind="stable")[:_GUESSES]
    return [(int(label), round(float(probabilities[label]), 4)) for label in order]


def owners_text(owners: Sequence[NDArray[np.int64]]) -> str:
    """The token of each patch ``(P,)`` after each step, as Base64 of 16-bit numbers."""
    numbers = np.concatenate(owners)
    return _text(np.where(numbers < 0, PRUNED, numbers).astype("<u2"))


def chances_text(chances: Sequence[NDArray[np.float32]]) -> str:
    """Probabilities ``(P,)`` of each decision as Base64 of bytes."""
    values = np.concatenate(chances)
    steps = np.where(np.isnan(values), NO_AGENT, np.nan_to_num(values) * CHANCES)
    return _text(steps.round().astype(np.uint8))


def data_uri(pixels: Pixels) -> str:
    """An image as a ``data:`` address: a small one as PNG, others as JPEG."""
    kind = "PNG" if max(pixels.shape[:2]) <= _SMALL else "JPEG"
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind, quality=_QUALITY, optimize=True)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"


def _text(values: NDArray[Any]) -> str:
    return base64.b64encode(values.tobytes()).decode()


def _short(value: float) -> float:
    """The value with five significant digits."""
    if not math.isfinite(value):
        raise ValueError(f"{value} can't be shown")
    return float(f"{value:.5g}")
