"""The cost of the game relative to its model, and the speed of each environment interface.

    python benchmarks/game_overhead.py
    python benchmarks/game_overhead.py --model deit_tiny_patch16_224 --batch 64 --device cuda

First table: a whole game that keeps all tokens and timm's own forward pass of the same images, in
turns, in one process; the ratio is taken round by round. Both read their images from the same
source. The weights are random, as the time does not depend on them.

Second table: agent-steps per second (images x agents x decisions) in Isaac Lab's three columns:
stepping alone with actions made in advance, with the policy's inference, and with training. Each
interface plays the embedded digits model. All tokens are kept in the first column; the untrained
policy of the others keeps nine of ten tokens, which makes stepping itself cheaper.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from agents import MAPPO, ActorPolicy, MAPPOConfig, PettingZooArena
from agents.policies.actor import Widths
from tokenenv import Backbone, Game, TokenPrune, build_game, load_backbone, open_source
from tokenenv.cli.options import positive
from tokenenv.envs.token_prune_pettingzoo import parallel_env
from tokenenv.envs.token_prune_vector import TokenPruneVectorEnv
from tokenenv.errors import run_script


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--batch", type=positive, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=positive, default=9)
    parser.add_argument("--execution", choices=["masked", "padded"], default=None)
    parser.add_argument(
        "--digits-batch", type=positive, default=64, help="images of the second table"
    )
    args = parser.parse_args()
    overhead(args)
    print()
    throughput(args)


def overhead(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    backbone = load_backbone(args.model, "random", args.device)
    source = open_source("FakeData", backbone.model, limit=2 * args.batch)
    game = build_game(model=backbone, data=source, batch_size=args.batch, execution=args.execution)
    for _ in game.prepare():
        pass
    index = torch.arange(args.batch)

    @torch.inference_mode()
    def dense() -> None:
        backbone(source.batch(index).images.to(args.device))

    keep = torch.ones(args.batch, game.agents, dtype=torch.long, device=args.device)

    def play() -> None:
        game.reset()
        for _ in range(game.steps):
            game.step(keep)

    ratios, times = [], []
    for turn in range(args.rounds + 1):
        # Who goes first changes from round to round.
        order = (dense, play) if turn % 2 else (play, dense)
        took = {work: clock(work, args.device) for work in order}
        ratios.append(took[play] / took[dense])
        times.append(took[dense])
    low, middle, high = statistics.quantiles(ratios[1:], n=4)  # the first round warms up
    print(
        f"{args.model}, batch {args.batch}, {args.device}, {game.execution} execution, "
        f"{torch.get_num_threads()} threads, {args.rounds} rounds"
    )
    print(f"  timm's forward          {statistics.median(times[1:]):.3f} s")
    print(f"  whole game / forward    {middle:.3f} (quartiles {low:.3f} to {high:.3f})")


def throughput(args: argparse.Namespace) -> None:
    backbone = load_backbone(device=args.device)
    batch = args.digits_batch
    print(f"agent-steps per second, digits_vit, {args.device}, {torch.get_num_threads()} threads")
    print(f"  {'face':34}{'step':>12}{'+ inference':>14}{'+ training':>13}")
    game = build_game(model=backbone, batch_size=batch)
    for _ in game.prepare():
        pass
    report(f"tensor game, batch {batch}", *tensor_game(game, args.device))
    report(f"Gymnasium VectorEnv (numpy), batch {batch}", *vector_env(backbone, batch))
    report("PettingZoo parallel, one image", *petting_zoo(backbone))


def policy_for(game: Game) -> ActorPolicy:
    widths = Widths(game.agent_dim, game.shared_dim, game.state_dim)
    return ActorPolicy(TokenPrune(), widths, initial=0.9).to(game.backbone.device)


def tensor_game(game: Game, device: str) -> tuple[float, float, float]:
    keep = torch.ones(game.batch_size, game.agents, dtype=torch.long, device=device)
    policy = policy_for(game)
    learner = MAPPO(policy, game, MAPPOConfig(steps=game.steps))

    def step() -> int:
        game.reset()
        for _ in range(game.steps):
            game.step(keep)
        return game.batch_size * game.agents * game.steps

    def infer() -> int:
        learner.collect()
        return game.batch_size * game.agents * game.steps

    def train() -> int:
        learner.update()
        return game.batch_size * game.agents * game.steps

    return rate(step), rate(infer), rate(train)


def vector_env(backbone: Backbone, batch: int) -> tuple[float, float, float]:
    env = TokenPruneVectorEnv(batch, model=backbone)
    seen, _ = env.reset(seed=0)
    keep = np.ones((batch, seen.shape[1]), np.int64)
    policy = policy_for(build_game(model=backbone))

    def step() -> int:
        env.step(keep)
        return keep.size

    state = {"seen": seen}

    @torch.no_grad()
    def infer() -> int:
        own, shared = split(torch.from_numpy(state["seen"]), policy)
        action = policy.logits(own, shared).argmax(-1)
        state["seen"] = env.step(action.numpy())[0]
        return keep.size

    return rate(step), rate(infer), float("nan")


def split(joined: torch.Tensor, policy: ActorPolicy) -> tuple[torch.Tensor, torch.Tensor]:
    """Split an environment's observation into the agent's own and the shared features."""
    own = policy.widths.own
    return joined[..., :own], joined[..., 0, own:]


def petting_zoo(backbone: Backbone) -> tuple[float, float, float]:
    env = parallel_env(model=backbone)
    env.reset(seed=0)
    keep = dict.fromkeys(env.possible_agents, 1)

    def step() -> int:
        if not env.agents:
            env.reset()
        env.step(keep)
        return len(keep)

    arena = PettingZooArena(lambda: parallel_env(model=backbone), 1)
    widths = Widths(arena.agent_dim, arena.shared_dim, arena.state_dim)
    learner = MAPPO(ActorPolicy(TokenPrune(), widths, initial=0.9), arena, MAPPOConfig(steps=12))

    def infer() -> int:
        learner.collect()
        return 12 * len(keep)

    def train() -> int:
        learner.update()
        return 12 * len(keep)

    return rate(step), rate(infer), rate(train)


def report(name: str, *rates: float) -> None:
    cells = (f"{r:,.0f}" if r == r else "-" for r in rates)
    print(f"  {name:34}" + "".join(f"{c:>{w}}" for c, w in zip(cells, (12, 14, 13), strict=True)))


def rate(work: Callable[[], int], seconds: float = 3.0) -> float:
    """Units of ``work`` per second, after one warm-up."""
    work()
    start, done = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < seconds:
        done += work()
    return done / spent


def clock(work: Callable[[], None], device: str) -> float:
    start = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    run_script(main)
