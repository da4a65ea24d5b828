"""Find DiffRate's rates for a model and a saving: how many tokens each block prunes and merges.

    python examples/diffrate_search.py --saving 50
    python examples/diffrate_search.py --model deit_tiny_patch16_224 --data imagenet/train \
        --images 64 --saving 35

The search is greedy (:mod:`tokenenv.tuning.rates`): in each step it prunes or merges ``--step``
more tokens where the divergence from the dense model's predictions grows least per multiply-add
saved. It prints a word that ``tokenenv evaluate`` and ``compare`` take. ``tokenenv tune`` runs the
same search over time and chooses by accuracy.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from tqdm import tqdm

from tokenenv import load_backbone, open_source
from tokenenv.cli.options import positive
from tokenenv.errors import run_script
from tokenenv.game.cost import Cost
from tokenenv.tuning.rates import Outcome, RateSearch, word_of

_BAR = "{l_bar}{bar}| {n:.1f} of {total:.1f} % saved [{elapsed}{postfix}]"


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="digits_vit", help="default: the embedded one")
    parser.add_argument("--weights", help="a file; default: timm's download")
    parser.add_argument("--data", help="training images; default: digits")
    parser.add_argument("--images", type=positive, default=128)
    parser.add_argument("--saving", type=float, default=50.0, help="percent of the MACs, above 0")
    parser.add_argument("--step", type=positive, help="default: a 24th of the tokens")
    args = parser.parse_args(argv)
    if not 0 < args.saving < 100:
        parser.error(f"--saving {args.saving:g}: give percent, between 0 and 100")

    backbone = load_backbone(args.model, args.weights)
    source = open_source(args.data, backbone.model, split="train", limit=args.images)
    images = source.batch(torch.arange(len(source))).images
    dense = F.log_softmax(backbone(images).float(), -1)
    with tqdm(total=round(args.saving, 1), unit="%", bar_format=_BAR) as bar:
        ran, damage = 0, 0.0

        def passed(count: int) -> None:
            nonlocal ran
            ran += count
            bar.set_postfix({"images run": ran, "divergence": f"{damage:.4f}"})

        def show(outcome: Outcome) -> None:
            nonlocal damage
            damage = outcome.damage
            bar.n = min(max(100 * outcome.saving, 0.0), bar.total)
            bar.refresh()

        search = RateSearch(backbone, images, dense, Cost(backbone), passed=passed)
        rates = search.run(args.saving / 100, args.step or max(1, backbone.patches // 24), show)
        found = search.outcome(rates)
    print(word_of(rates))
    print(
        f"{100 * found.saving:.1f} % fewer MACs (1 MAC = 1 FLOP), divergence {found.damage:.4f} "
        f"nats on {len(images)} training images"
    )


if __name__ == "__main__":
    run_script(main)
