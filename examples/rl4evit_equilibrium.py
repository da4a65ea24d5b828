"""RL4EViT's equilibrium: how many tokens are kept for a given alpha / beta.

    python examples/rl4evit_equilibrium.py --out equilibrium.png

The agent of every kept token pays beta, and these agents share alpha if the prediction is correct.
With a probability p of a correct prediction, keeping and pruning are worth the same to an agent if
alpha p / kept = beta, so the equilibrium is kept* = p alpha / beta (docs/papers.md, section 6). The
paper's Fig. 3 shows the share of tokens kept against alpha / beta.

This script trains MAPPO on the embedded game with RL4EViT's own reward and one decision, for each
ratio and several seeds. It draws the share of tokens that the trained policy keeps, and the
equilibrium at the accuracy it reaches. Both are means over sampled actions in training, because
the equilibrium is one of expectations.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from tqdm import tqdm

from agents import MAPPO, ActorPolicy, MAPPOConfig
from agents.policies.actor import Widths
from tokenenv import AlphaBeta, Backbone, build_game, load_backbone
from tokenenv.cli.options import positive
from tokenenv.game.figures import new_figure

BETA = 0.1


def kept_and_right(
    backbone: Backbone, ratio: float, seed: int, updates: int
) -> tuple[float, float]:
    """Mean share of kept tokens and of correct predictions over the last fifth of training."""
    torch.manual_seed(seed)
    game = build_game(
        model=backbone,
        blocks=(3,),
        features=("position", "progress", "cls_attention"),
        reward=AlphaBeta(alpha=ratio * BETA, beta=BETA, class_reward="final"),
        batch_size=64,
    )
    game.seed(seed)
    widths = Widths(game.agent_dim, game.shared_dim, game.state_dim)
    policy = ActorPolicy(game.rules, widths, initial=0.8)
    config = MAPPOConfig(steps=1, actor_lr=5e-3, critic_lr=5e-3, entropy=0.0)
    learner = MAPPO(policy, game, config, seed=seed)
    kept, right = [], []
    for _ in range(updates):
        kept.append(learner.update()["keep"])
        assert game.episode is not None and game.episode.logits is not None
        correct = game.episode.logits.argmax(1) == game.labels
        right.append(correct.float().mean().item())
    last = updates // 5
    return statistics.mean(kept[-last:]), statistics.mean(right[-last:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="equilibrium.png", help="picture to write")
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--updates", type=positive, default=80)
    args = parser.parse_args()
    backbone = load_backbone()
    patches = backbone.patches
    shares = (0.2, 0.35, 0.5, 0.65, 0.8)
    rows = []
    for share in tqdm(shares, desc="alpha / beta"):
        found = [
            kept_and_right(backbone, share * patches, seed, args.updates)
            for seed in range(args.seeds)
        ]
        rows.append([list(column) for column in zip(*found, strict=True)])
    print(f"{patches} tokens, beta {BETA}, {args.seeds} seeds: mean (spread) over seeds")
    print("alpha/beta   share kept        p (right)   balance p alpha/beta / tokens")
    for share, (kept, right) in zip(shares, rows, strict=True):
        p = statistics.mean(right)
        print(
            f"{share * patches:8.1f}     {statistics.mean(kept):.3f} ({max(kept) - min(kept):.3f})"
            f"     {p:.3f}       {p * share:.3f}"
        )
    draw(args.out, shares, rows, patches)
    print(f"wrote {args.out}")


def draw(path: str, shares: tuple[float, ...], rows: list, patches: int) -> None:
    figure = new_figure(6, 4)
    axis = figure.subplots()
    ratios = [share * patches for share in shares]
    balance = [
        statistics.mean(right) * share for share, (_, right) in zip(shares, rows, strict=True)
    ]
    axis.plot(ratios, balance, "k--", lw=1, label=r"balance $p\,\alpha/\beta$, as share of tokens")
    middle = [statistics.mean(kept) for kept, _ in rows]
    low = [m - min(kept) for m, (kept, _) in zip(middle, rows, strict=True)]
    high = [max(kept) - m for m, (kept, _) in zip(middle, rows, strict=True)]
    axis.errorbar(ratios, middle, [low, high], fmt="o", capsize=3, label="MAPPO, range over seeds")
    axis.set(xlabel=r"$\alpha/\beta$", ylabel="share of tokens kept", ylim=(0, 1))
    axis.set_title("RL4EViT's reward on the embedded digits, one decision")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
