"""What training adds on the test scenes at equal cost, over seeds and images.

    for S in 0 1 2; do OMP_NUM_THREADS=1 tokenenv train --seed $S --out run$S; done
    OMP_NUM_THREADS=1 python benchmarks/scenes_seeds.py run0 run1 run2 \
        --against 'cls-attention:keep=0.44,blocks=1/2/4' 'cls-attention:keep=0.5,blocks=1/2/4'

Each trained policy is compared with its own untrained start and with the methods that are named.
What it is compared with has exactly its cost: for each image one of two settings is drawn, the next
cheaper and the next dearer one, and an image counts by the probability that it is right. The two
thresholds of the start are chosen by their cost on training images.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from agents.policies.words import parse_policy
from agents.systems.registry import settings_of
from agents.training.run import Run
from tokenenv.data import ImageSource, open_source
from tokenenv.measure import evaluate
from tokenenv.measure.paired import difference_over_seeds
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.load import load_backbone

_SAMPLE = 512  # training images for the start's thresholds


class Point(NamedTuple):
    """Mean cost as a share of the dense model's, and which images are right, ``(n,)``."""

    cost: float
    right: NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="run folders, one for each seed")
    parser.add_argument("--against", nargs="*", default=[], help="settings of one other method")
    args = parser.parse_args()
    runs = [Run.open(folder) for folder in args.runs]
    backbone = load_backbone(runs[0].config["model"])
    test = open_source(None, backbone.model, split="test")
    dense = torch.zeros(len(test), dtype=torch.long)  # not compared with

    def point(method: Any, images: ImageSource = test) -> Point:
        found = evaluate(backbone, method, images, dense=dense[: len(images)])
        right = (found.reduced == found.labels).double().numpy()
        return Point(found.macs.mean().item() / found.dense_macs, right)

    trained = [point(run.policy) for run in runs]
    starts = [
        start_at(run, backbone, one.cost, point) for run, one in zip(runs, trained, strict=True)
    ]
    report("untrained", trained, starts)
    others = [point(parse_policy(word, backbone.depth)) for word in args.against]
    if others:
        report(args.against[0].partition(":")[0], trained, [mixed(others, t.cost) for t in trained])


def start_at(run: Run, backbone: Backbone, cost: float, point: Any) -> Point:
    """The untrained start of a run at a cost."""
    settings: Any = settings_of(run.config)
    source = open_source(None, backbone.model, split="train")
    fit, _ = source.split(settings.held_back, seed=run.config["seed"])
    torch.manual_seed(run.config["seed"])
    policy = settings.policy(settings.game(backbone, fit), run.config["model"]).eval()
    sample = fit.subset(_SAMPLE, seed=0)
    low, high = 0.0, 1.0
    for _ in range(10):  # the cost falls with the threshold
        policy.threshold = (low + high) / 2
        dearer = point(policy, sample).cost > cost
        low, high = (policy.threshold, high) if dearer else (low, policy.threshold)
    found = []
    for policy.threshold in (low - 0.02, high + 0.02):
        found.append(point(policy))
    return mixed(found, cost)


def mixed(points: list[Point], cost: float) -> Point:
    """Two of the points, drawn for each image so that their mean cost is ``cost``."""
    for cheap, dear in itertools.pairwise(sorted(points, key=lambda point: point.cost)):
        if cheap.cost <= cost <= dear.cost:
            share = (cost - cheap.cost) / (dear.cost - cheap.cost)
            return Point(cost, (1 - share) * cheap.right + share * dear.right)
    costs = ", ".join(f"{point.cost:.4f}" for point in points)
    raise SystemExit(f"{cost:.4f} is not between the costs {costs}: give other settings")


def report(name: str, trained: list[Point], others: list[Point]) -> None:
    for one, other in zip(trained, others, strict=True):
        print(
            f"{100 * (1 - one.cost):.2f} % saved: trained {100 * one.right.mean():.2f} %, "
            f"{name} {100 * other.right.mean():.2f} %"
        )
    apart = difference_over_seeds(
        np.stack([one.right for one in trained]), np.stack([other.right for other in others])
    )
    print(f"trained minus {name}, over seeds and images, points: {apart}", flush=True)


if __name__ == "__main__":
    main()
