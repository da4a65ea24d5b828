"""Find DiffRate's rates for a model and a saving: how many tokens each block prunes and merges.

    python examples/diffrate_search.py --saving 50
    python examples/diffrate_search.py --model deit_tiny_patch16_224 --data imagenet/train \
        --images 64 --saving 35

DiffRate (Chen et al., ICCV 2023) learns its rates by gradient. This search is greedy and needs
neither gradients nor labels: in each step it prunes or merges ``--step`` more tokens in the block
where the divergence from the dense model's predictions grows least per multiply-add saved, until
the saving is reached. It prints words that ``tokenenv evaluate`` and ``compare`` take.
"""

from __future__ import annotations

import argparse
import heapq
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from tokenenv import Backbone, load_backbone, open_source
from tokenenv.cli.options import positive
from tokenenv.errors import run_script
from tokenenv.game.cost import Cost
from tokenenv.game.policy import play
from tokenenv.reducers import DiffRate


@dataclass(frozen=True)
class Outcome:
    """The effect of rates: mean KL divergence from the dense predictions, share of MACs saved."""

    damage: float
    saving: float


@dataclass(frozen=True)
class Search:
    """The images that rates are tried on, and the dense model's predictions for them."""

    backbone: Backbone
    images: Tensor
    dense: Tensor
    cost: Cost

    def outcome(self, rates: DiffRate) -> Outcome:
        """The outcome of rates, from one pass over the images."""
        policy = rates
        episode = play(self.backbone, policy, self.images)
        assert episode.logits is not None
        log_probs = F.log_softmax(episode.logits.float(), -1)
        damage = F.kl_div(log_probs, self.dense, reduction="batchmean", log_target=True)
        macs = self.cost.of(episode, policy).mean().item()
        return Outcome(damage.item(), 1 - macs / self.cost.dense())

    def run(self, saving: float, step: int) -> DiffRate:
        """The first rates on the greedy path that save ``saving`` of the multiply-adds.

        The cost of a move mostly grows with the moves made before it. So only the move that was
        cheapest when last tried is tried again, until the cheapest one was tried at the current
        rates.
        """
        depth = self.backbone.depth
        rates = DiffRate(tuple(range(depth)), (0,) * depth, (0,) * depth)
        now, turn = self.outcome(rates), 0
        # price when last tried (of equals the one that saves most), when that was, what came of it
        kinds = ("prune", "merge")
        moves = [(-math.inf, 0.0, -1, kind, block, now) for kind in kinds for block in range(depth)]
        with tqdm(total=round(100 * saving, 1), unit="%", bar_format=_BAR) as bar:
            while now.saving < saving:
                if not moves:
                    raise SystemExit(f"no rates save {100 * saving:.1f} %: ask for less")
                *_, tried, kind, block, then = heapq.heappop(moves)
                numbers = list(getattr(rates, kind))
                numbers[block] += step
                more = replace(rates, **{kind: tuple(numbers)})
                if tried < turn:
                    then = self.outcome(more)
                    if then.saving > now.saving:
                        price = (then.damage - now.damage) / (then.saving - now.saving)
                        heapq.heappush(moves, (price, -then.saving, turn, kind, block, then))
                    continue
                now, rates, turn = then, more, turn + 1
                heapq.heappush(moves, (-math.inf, 0.0, -1, kind, block, now))
                bar.set_postfix(divergence=f"{now.damage:.4f}", refresh=False)
                bar.update(min(100 * now.saving, bar.total) - bar.n)
        return rates


_BAR = "{l_bar}{bar}| {n:.1f} of {total:.1f} % saved [{elapsed}<{remaining}{postfix}]"


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
    search = Search(backbone, images, dense, Cost(backbone))
    step = args.step or max(1, backbone.patches // 24)
    rates = search.run(args.saving / 100, step)
    found = search.outcome(rates)
    words = ["/".join(map(str, numbers)) for numbers in (rates.prune, rates.merge)]
    print(f"diffrate:prune={words[0]},merge={words[1]}")
    print(
        f"{100 * found.saving:.1f} % fewer MACs (1 MAC = 1 FLOP), divergence {found.damage:.4f} "
        f"nats on {len(images)} training images"
    )


if __name__ == "__main__":
    run_script(main)
