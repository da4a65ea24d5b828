"""The share of a forward pass that decisions take: matching, observing, the policy, gathering.

Runs on a CPU, where a call returns when its work is done:

    python benchmarks/decision_cost.py tome:r=13 random:keep=0.5..0.9,blocks=3/6/9 --batch 64

A policy runs on any model, also one that it was not trained for, to measure the cost on a larger
one. ``--share`` adds the speed-up, and its ratio to that of a model whose tokens are only sliced to
the same lengths.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from agents.policies.words import parse_policy
from tokenenv.cli.options import positive
from tokenenv.errors import run_script
from tokenenv.game.policy import Policy, play
from tokenenv.measure.candidate import MethodCandidate
from tokenenv.measure.speed import bench
from tokenenv.vit import attention, blocks, packing
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.layout import Packing
from tokenenv.vit.load import load_model, untrained_model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="+", help="a policy as 'tokenenv evaluate' takes it")
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--weights", help="default: random ones")
    parser.add_argument("--data", help="folder of images; default: random ones")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--share", action="store_true", help="speed-up and its realised share too")
    args = parser.parse_args()

    model = load_model(args.model, args.weights) if args.weights else untrained_model(args.model)
    backbone = Backbone(model)
    if args.data:
        from tokenenv.data import open_source

        source = open_source(args.data, model, split="test", limit=args.batch)
        images = source.batch(torch.arange(len(source))).images
    else:
        shape = (args.batch, *backbone.image_shape)
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    policies: dict[str, Any] = {what: parse_policy(what, backbone.depth) for what in args.what}
    for what, policy in policies.items():
        with torch.inference_mode():
            play(backbone, policy, images)
            rounds = [_shares(backbone, policy, images) for _ in range(args.rounds)]
        total = torch.tensor([sum(shares.values()) for shares in rounds])
        print(f"{what}: {100 * total.median():.1f} % of the forward pass, batch {len(images)}")
        for name in rounds[0]:
            share = torch.tensor([shares[name] for shares in rounds]).median()
            print(f"  {name:18}{100 * share:5.1f} %")
    if args.share:
        for policy in policies.values():
            if isinstance(policy, Policy):
                policy.trained_on = ""  # play whatever model is named
        candidates = [MethodCandidate(*item, backbone) for item in policies.items()]
        for row in bench(backbone, candidates, images, rounds=args.rounds)[1:]:
            print(
                f"{row.what}: {100 * (1 - row.gmacs / row.gmacs_dense):.1f} % fewer MACs (1 MAC = "
                f"1 FLOP), {row.speedup:.3f} x, realised share {row.realised_share:.3f}"
            )


def _shares(backbone: Backbone, policy: Any, images: torch.Tensor) -> dict[str, float]:
    """The share of one forward pass that each step took; nested steps are counted once."""
    seconds = dict.fromkeys(
        (
            "mean keys", "class attention", "match", "observe", "policy", "apply", "pack, unpack",
        ),
        0.0,
    )  # fmt: skip
    inside = False

    def timed(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:
                return run(*args, **kwargs)
            inside = True
            start = time.perf_counter()
            try:
                return run(*args, **kwargs)
            finally:
                seconds[name] += time.perf_counter() - start
                inside = False

        return call

    steps: list[tuple[Any, str, str]] = [
        (type(policy.reduction), "prepare", "match"),
        (type(policy.reduction), "apply", "apply"),
        *([(type(policy.rules), "observe", "observe")] if isinstance(policy, Policy) else []),
        *([(type(policy), "act", "policy")] if isinstance(policy, Policy) else []),
        (attention, "class_row", "class attention"),
        (attention, "first_scores", "class attention"),
        (blocks, "mean_head", "mean keys"),
        (Packing, "unpack", "pack, unpack"),
        (packing, "pack", "pack, unpack"),
        (packing, "compact", "pack, unpack"),
    ]
    whole = {(owner, attribute): getattr(owner, attribute) for owner, attribute, _ in steps}
    for owner, attribute, name in steps:
        setattr(owner, attribute, timed(name, whole[owner, attribute]))
    try:
        start = time.perf_counter()
        play(backbone, policy, images)
        took = time.perf_counter() - start
    finally:
        for (owner, attribute), run in whole.items():
            setattr(owner, attribute, run)
    return {name: spent / took for name, spent in seconds.items()}


if __name__ == "__main__":
    run_script(main)
