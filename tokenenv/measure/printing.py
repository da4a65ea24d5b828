"""What commands and trainings say of an evaluation: on the screen, in words, as JSON."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from tqdm import tqdm

from tokenenv.data import ImageSource
from tokenenv.game.policy import Method
from tokenenv.measure import evaluation as metrics
from tokenenv.vit.backbone import Backbone

MAC_NOTE = "1 MAC = 1 FLOP, policy included, frozen backbone"
_TUNED_NOTE = "1 MAC = 1 FLOP, policy included, fine-tuned backbone"


@contextlib.contextmanager
def evaluation_bar(source: ImageSource) -> Iterator[Callable[[int], object]]:
    """A progress bar over the images; what it gives takes the number of those done."""
    with tqdm(total=len(source), unit="image", desc="evaluating", leave=False, disable=None) as bar:
        yield bar.update


def evaluate_with_bar(
    backbone: Backbone, policy: Method, source: ImageSource, **options: Any
) -> metrics.Evaluation:
    """:func:`tokenenv.measure.evaluation.evaluate` with a progress bar."""
    with evaluation_bar(source) as progress:
        return metrics.evaluate(backbone, policy, source, progress=progress, **options)


def evaluation_json(model: str, source: ImageSource, result: metrics.Evaluation) -> dict[str, Any]:
    """What the reports of both commands say of an evaluation."""
    return {
        "model": model,
        "data": source.name,
        "skipped": len(source.skipped),
        **result.report(),
    }


def print_result(source: ImageSource, result: metrics.Evaluation, frozen: bool = True) -> None:
    """A table of the dense and the reduced model; ``frozen``: whether both have one backbone."""
    r = result.report()
    print(f"{r['images']} images of {source.name} ({MAC_NOTE if frozen else _TUNED_NOTE}):")
    print(f"  {'':8}{'top-1 %':>9}{'GMACs/image':>13}{'images/s':>10}")
    print(
        f"  {'dense':8}{r['top1_dense']:9.2f}{r['gmacs_dense']:13.4f}"
        f"{r['images_per_s_dense']:10.1f}"
    )
    print(f"  {'reduced':8}{r['top1']:9.2f}{r['gmacs']:13.4f}{r['images_per_s']:10.1f}")
    print(f"  {in_words(result.saving, result.drop)}, {r['agreement']:.1f} % same prediction")
    print(f"  visual tokens, block by block: {' '.join(f'{n:.0f}' for n in r['tokens'])}")


def parameters_json(model: nn.Module, dense: nn.Module) -> dict[str, int]:
    """How many parameters a model and the dense one have."""
    counts = [sum(p.numel() for p in each.parameters()) for each in (model, dense)]
    return {"parameters": counts[0], "parameters_dense": counts[1]}


def print_parameters(parameters: int, dense: int) -> None:
    """How many parameters a model and the dense one have, in millions."""
    print(f"  {parameters / 1e6:.3f} M parameters, dense {dense / 1e6:.3f} M")


def in_words(saving: float, drop: float) -> str:
    """Such as ``"23.4 % fewer MACs, top-1 0.50 points lower"``."""
    macs = f"{abs(saving):.1f} % {'fewer' if saving >= 0 else 'more'} MACs"
    if abs(drop) < 0.005:
        return f"{macs}, same top-1"
    return f"{macs}, top-1 {abs(drop):.2f} points {'lower' if drop > 0 else 'higher'}"


def report_skipped(source: ImageSource) -> None:
    """Say which images could not be read."""
    if source.skipped:
        print(
            f"skipped {len(source.skipped)} unreadable images of {source.name}, "
            f"for example '{source.skipped[0]}'"
        )
