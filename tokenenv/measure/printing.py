"""Evaluations as text for the screen and as JSON for reports."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from tqdm import tqdm

from tokenenv.data import ImageSource
from tokenenv.game.policy import Method
from tokenenv.measure.evaluation import Evaluation, evaluate
from tokenenv.vit.backbone import Backbone

MAC_NOTE = "1 MAC = 1 FLOP, policy included, frozen backbone"
_TUNED_NOTE = "1 MAC = 1 FLOP, policy included, fine-tuned backbone"
_CERTIFIED = 0.5
"""Half the width of an interval of the change in top-1 that would count as sure, points."""


@contextlib.contextmanager
def evaluation_bar(source: ImageSource) -> Iterator[Callable[[int], object]]:
    """Show a progress bar; yields a function that takes the number of images done since."""
    with tqdm(total=len(source), unit="image", desc="evaluating", leave=False, disable=None) as bar:
        yield bar.update


def evaluate_with_bar(
    backbone: Backbone, policy: Method, source: ImageSource, **options: Any
) -> Evaluation:
    """:func:`tokenenv.measure.evaluation.evaluate` with a progress bar."""
    with evaluation_bar(source) as progress:
        return evaluate(backbone, policy, source, progress=progress, **options)


def evaluation_json(model: str, source: ImageSource, result: Evaluation) -> dict[str, Any]:
    """An evaluation as the reports of ``train`` and ``evaluate`` have it."""
    return {
        "model": model,
        "data": source.name,
        "preprocessing": source.preprocessing.to_json(),
        "skipped": len(source.skipped),
        **result.report(),
    }


def print_result(source: ImageSource, result: Evaluation, frozen: bool = True) -> None:
    """Print a table of both models; ``frozen``: whether they share the dense model's weights."""
    r = result.report()
    print(f"{r['images']} images of {source.name} ({MAC_NOTE if frozen else _TUNED_NOTE}):")
    print(f"  preprocessing: {source.preprocessing}")
    print(f"  {'':8}{'top-1 %':>9}{'GMACs/image':>13}{'images/s':>10}")
    print(
        f"  {'dense':8}{r['top1_dense']:9.2f}{r['gmacs_dense']:13.4f}"
        f"{r['images_per_s_dense']:10.1f}"
    )
    print(f"  {'reduced':8}{r['top1']:9.2f}{r['gmacs']:13.4f}{r['images_per_s']:10.1f}")
    if result.dense_executed < result.dense_macs:
        print(
            f"  executed: {r['gmacs_executed']:.4f} GMACs/image, dense "
            f"{r['gmacs_dense_executed']:.4f}; of the last block only what the head reads"
        )
    if result.cost is not None:
        print(
            f"  predicted: {r['predicted_ms']:.3f} ms/image, dense {r['predicted_ms_dense']:.3f} "
            f"({result.cost_saving:.1f} % less)"
        )
    nats = "" if result.divergence is None else f", divergence {r['divergence']:.4f} nats"
    print(
        f"  {saving_in_words(result.saving, result.drop)}, {r['agreement']:.1f} % same prediction"
        f"{nats}"
    )
    print(
        f"  top-1 change {result.change()} points (95 % interval); +-{_CERTIFIED} points would "
        f"take about {result.images_needed(_CERTIFIED):,} images"
    )
    if result.dense_seconds and result.seconds > result.dense_seconds:
        print("  slower than the dense model here: 'tokenenv bench' tells at which batch sizes")
    print(f"  visual tokens, block by block: {' '.join(f'{n:.0f}' for n in r['tokens'])}")


def parameters_json(model: nn.Module, dense: nn.Module) -> dict[str, int]:
    """Number of parameters of a model and of the dense one, as the report has them."""
    counts = [sum(p.numel() for p in each.parameters()) for each in (model, dense)]
    return {"parameters": counts[0], "parameters_dense": counts[1]}


def print_parameters(parameters: int, dense: int) -> None:
    """Print the number of parameters of a model and of the dense one, in millions."""
    print(f"  {parameters / 1e6:.3f} M parameters, dense {dense / 1e6:.3f} M")


def saving_in_words(saving: float, drop: float, words: str = "fewer MACs") -> str:
    """Saving and loss in percent as ``"23.4 % fewer MACs, top-1 0.50 points lower"``.

    ``words``: what a saving is called, see :class:`~tokenenv.game.cost.Costs`.
    """
    if saving < 0:
        words = words.replace("fewer", "more").replace("less", "more")
    macs = f"{abs(saving):.1f} % {words}"
    if abs(drop) < 0.005:
        return f"{macs}, same top-1"
    return f"{macs}, top-1 {abs(drop):.2f} points {'lower' if drop > 0 else 'higher'}"


def report_skipped(source: ImageSource) -> None:
    """Print how many images could not be read, with an example."""
    if source.skipped:
        print(
            f"skipped {len(source.skipped)} unreadable images of {source.name}, "
            f"for example '{source.skipped[0]}'"
        )
