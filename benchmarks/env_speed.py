"""Agent-steps per second of the environments, of other libraries' games, and of the bare ViT.

    python benchmarks/env_speed.py
    python benchmarks/env_speed.py --model scenes_vit --batch 64
    python benchmarks/env_speed.py --device cuda --batch 64,256,1024
    OMP_NUM_THREADS=2 python benchmarks/env_speed.py --json speed.json

An agent-step is one action of one active agent. Everything is measured in one process, in rounds in
which each contestant plays in turn; printed are the median and the quartiles over the rounds. The
game is an embedded one, digits unless ``--model`` says otherwise, and the dense model's logits of
all images are computed in advance, as after the first epoch of training. The contestants:

- bare ViT, the upper limit: timm's model on the same images under inference_mode. Its agent-steps
  are those of the game below it in the time of one forward pass, as if the game cost nothing.
- tensor game: all tokens are kept, so that as much is computed as in the bare ViT. Three decisions,
  or "every block": all blocks, without the attention feature, which block 0 doesn't have.
- VectorEnv, TorchRLEnv: all tokens are kept.
- tensor game, random: random keep or prune, for comparison with the naive loop; with three
  decisions, and with one in every block.
- naive loop: one image at a time through PettingZoo's parallel env, ``action_space.sample()`` for
  each agent. "PettingZoo, one image": all tokens are kept, with actions made in advance.
- VMAS (``pip install vmas``) and MPE2 through SuperSuit (``pip install mpe2 supersuit``): both
  simple_spread, three agents, random actions made in advance.

Then it prints how the cost grows with the images in a batch, and with the tokens (64, 256, 1,024
agents: larger images of ``digits_vit``, random weights), compared with the bare ViT.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import timm
import torch

import tokenenv.vit.digits  # noqa: F401  (registers digits_vit)
from tokenenv import Backbone, Game, ImageSource, build_game, load_backbone, open_source
from tokenenv.envs.token_prune_pettingzoo import parallel_env
from tokenenv.envs.token_prune_vector import TokenPruneVectorEnv
from tokenenv.errors import run_script
from tokenenv.vit.load import EMBEDDED, EMBEDDED_MODELS, check_dtype

ID = "tokenenv/TokenPrune-v0"
EVERY_BLOCK = ("token", "position", "progress")
DENSE: dict[ImageSource, Any] = {}
"""What the dense model says of the images of a source."""


class Contestant(NamedTuple):
    """One row of the table: ``play`` runs a unit of ``images`` and returns its agent-steps."""

    name: str
    batch: int
    images: int
    play: Callable[[], int]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=EMBEDDED, choices=EMBEDDED_MODELS)
    parser.add_argument("--batch", default="1,8,64,256,1024", help="images at once, by commas")
    parser.add_argument("--tokens", default="8,16,32", help="sides of the square images, by commas")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each contestant per round")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="also bfloat16, float16")
    parser.add_argument("--json", help="file to write all numbers to")
    parser.add_argument("--quick", action="store_true", help="two batches, two rounds: a test")
    args = parser.parse_args()
    if args.quick:
        args.batch, args.tokens, args.rounds, args.seconds = "1,2", "8", 2, 0.0
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: quartiles need two or more")
    batches, sides = (
        numbers(parser, "--batch", args.batch),
        numbers(parser, "--tokens", args.tokens),
    )
    if args.json:
        try:
            open(args.json, "a").close()  # before minutes of work
        except OSError as error:
            parser.error(f"--json {args.json}: {error.strerror}")
    print(
        f"{args.model}, {args.device}, {args.dtype}, {torch.get_num_threads()} threads, "
        f"{args.rounds} rounds"
    )
    torch.manual_seed(0)
    backbone = load_backbone(args.model, device=args.device, dtype=args.dtype)
    limit = 8 if args.quick else None
    source = open_source(None, backbone.model, split="train", limit=limit)
    often = {"blocks": tuple(range(backbone.depth)), "features": EVERY_BLOCK}
    single = [
        naive("naive loop", backbone, source),
        naive("naive loop, every block", backbone, source, **often),
        petting_zoo(backbone, source),
    ]
    rows, rivals = [], others()
    print(f"{'':36}{'agent-steps/s':>15}{'(quartiles)':>27}{'images/s':>11}")
    for batch in batches:
        contestants = [*of_batch(backbone, source, batch, often), *single]
        contestants += [Contestant(name, batch, 0, make(batch)) for name, make in rivals]
        measured = measure(contestants, args.rounds, args.seconds, args.device)
        rows += report(contestants, measured)
        print(summary(measured, batch))
    print("growth with images: cost of an image over that in the smallest batch")
    images = grown(rows, "tensor game", "bare ViT")
    print("growth with tokens: milliseconds per image")
    tokens = [of_side(side, args) for side in sides]
    if args.json:
        made = {
            "model": args.model, "device": args.device, "dtype": args.dtype,
            "threads": torch.get_num_threads(),
            "rounds": args.rounds, "torch": torch.__version__, "rows": rows, "images": images,
            "tokens": tokens,
        }  # fmt: skip
        with open(args.json, "w") as file:
            json.dump(made, file, indent=1)


def numbers(parser: argparse.ArgumentParser, option: str, text: str) -> list[int]:
    found = [int(part) for part in text.split(",") if part.isdecimal()]
    if len(found) <= text.count(",") or min(found) < 1:
        parser.error(f"{option} {text}: give whole numbers from 1, separated by commas")
    return list(dict.fromkeys(found))


# Contestants -------------------------------------------------------------------------------------
def of_batch(
    backbone: Backbone, source: ImageSource, batch: int, often: dict[str, Any]
) -> list[Contestant]:
    made = []
    for ending, kwargs in (("", {}), (", every block", often)):
        game = opened(backbone, source, batch, **kwargs)
        made += [
            bare(backbone, game, f"bare ViT{ending}"),
            Contestant(f"tensor game{ending}", batch, batch, keeping(game)),
            Contestant(f"tensor game, random{ending}", batch, batch, drawing(game)),
        ]
    for output in ("torch", "numpy"):
        env = TokenPruneVectorEnv(batch, model=backbone, data=source, output=output)
        made.append(Contestant(f"VectorEnv ({output})", batch, batch, vector(env)))
    if find_spec("torchrl"):
        made.append(Contestant("TorchRLEnv", batch, batch, torchrl(backbone, source, batch)))
    return made


def opened(backbone: Backbone, source: ImageSource, batch: int, **kwargs: Any) -> Game:
    game = build_game(model=backbone, data=source, batch_size=batch, **kwargs)
    prepare(game)
    return game


def prepare(game: Game) -> None:
    """The dense model's logits of all images, computed once for all games of a source."""
    if game.source in DENSE:
        game.answers = DENSE[game.source].copy()
    for _ in game.prepare():
        pass
    DENSE[game.source] = game.answers


def bare(backbone: Backbone, game: Game, name: str) -> Contestant:
    images = game.reset() and game.images

    @torch.inference_mode()
    def play() -> int:
        backbone(images)
        return game.batch_size * game.agents * game.steps

    return Contestant(name, game.batch_size, game.batch_size, play)


def keeping(game: Game) -> Callable[[], int]:
    keep = torch.ones(game.batch_size, game.agents, dtype=torch.long, device=game.backbone.device)

    def play() -> int:
        game.reset()
        for _ in range(game.steps):
            game.step(keep)
        return keep.numel() * game.steps

    return play


def drawing(game: Game) -> Callable[[], int]:
    def play() -> int:
        seen, alive = game.reset(), []
        while seen is not None:
            alive.append(seen.active.sum())
            seen = game.step(torch.randint_like(seen.active, 2, dtype=torch.long)).observation
        return int(sum(alive))

    return play


def vector(env: TokenPruneVectorEnv) -> Callable[[], int]:
    keep: Any = torch.ones(
        env.num_envs, env.game.agents, dtype=torch.long, device=env.game.backbone.device
    )
    decided = keep.numel() * env.max_cycles
    if env.output == "numpy":
        keep = keep.cpu().numpy()

    def play() -> int:  # the next images come with the last step
        for _ in range(env.max_cycles):
            env.step(keep)
        return decided

    return prepared(env, play)


def torchrl(backbone: Backbone, source: ImageSource, batch: int) -> Callable[[], int]:
    from tokenenv.envs.torchrl import TorchRLEnv

    env = TorchRLEnv(ID, batch, model=backbone, data=source)
    prepare(env.game)
    env.set_seed(0)
    keep = torch.ones(batch, env.game.agents, dtype=torch.long, device=backbone.device)

    def play() -> int:
        data = env.reset()
        for _ in range(env.game.steps):
            data = env.step(data.set(("agents", "action"), keep))["next"]
        return keep.numel() * env.game.steps

    return play


def naive(name: str, backbone: Backbone, source: ImageSource, **kwargs: Any) -> Contestant:
    env = parallel_env(model=backbone, data=source, **kwargs)

    def play() -> int:
        _, infos = env.reset()
        decided = 0
        while env.agents:
            decided += sum(info["active_mask"] for info in infos.values())
            actions = {agent: env.action_space(agent).sample() for agent in env.agents}
            _, _, _, _, infos = env.step(actions)
        return decided

    return Contestant(f"{name}, one image", 1, 1, prepared(env, play))


def petting_zoo(backbone: Backbone, source: ImageSource) -> Contestant:
    env = parallel_env(model=backbone, data=source)
    keep = dict.fromkeys(env.possible_agents, 1)

    def play() -> int:
        env.reset()
        while env.agents:
            env.step(keep)
        return len(keep) * env.max_cycles

    return Contestant("PettingZoo, one image", 1, 1, prepared(env, play))


def prepared(env: Any, play: Callable[[], int]) -> Callable[[], int]:
    prepare(env.game)
    env.reset(seed=0)
    return play


def others() -> list[tuple[str, Callable[[int], Callable[[], int]]]]:
    """The other libraries' games that are installed."""
    made = []
    for name, libraries, maker in (
        ("VMAS simple_spread", ("vmas",), vmas),
        ("MPE2 simple_spread, SuperSuit", ("mpe2", "supersuit"), mpe2),
    ):
        missing = [library for library in libraries if not find_spec(library)]
        if missing:
            print(f"{name} is left out: pip install {' '.join(missing)}")
        else:
            made.append((name, maker))
    return made


def vmas(batch: int) -> Callable[[], int]:
    from vmas import make_env

    env = make_env("simple_spread", num_envs=batch, continuous_actions=False, seed=0)
    env.reset()
    actions = [env.get_random_action(agent) for agent in env.agents]

    def play() -> int:
        for _ in range(10):
            env.step(actions)
        return 10 * batch * len(env.agents)

    return play


def mpe2(batch: int) -> Callable[[], int]:
    import supersuit
    from mpe2 import simple_spread_v3

    one = supersuit.pettingzoo_env_to_vec_env_v1(simple_spread_v3.parallel_env())
    envs = supersuit.concat_vec_envs_v1(one, batch, num_cpus=0, base_class="gymnasium")
    envs.reset(seed=0)
    actions = np.random.default_rng(0).integers(0, 5, envs.num_envs)

    def play() -> int:
        envs.step(actions)
        return len(actions)

    return play


# Measuring ----------------------------------------------------------------------------------------
def measure(
    contestants: list[Contestant], rounds: int, seconds: float, device: str
) -> dict[str, list[tuple[float, float]]]:
    """Agent-steps and units per second of each contestant in each round after a warm-up."""
    heard: dict[str, list[tuple[float, float]]] = {c.name: [] for c in contestants}
    for turn in range(rounds + 1):
        # Every second round is in reverse order, as a contestant may warm the next one's caches.
        for c in contestants if turn % 2 else reversed(contestants):
            units, steps, start = 0, 0, time.perf_counter()
            while units == 0 or time.perf_counter() - start < seconds:
                steps, units = steps + c.play(), units + 1
                if device.startswith("cuda"):
                    torch.cuda.synchronize()
            spent = time.perf_counter() - start
            heard[c.name].append((steps / spent, units / spent))
    return {name: values[1:] for name, values in heard.items()}


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def report(
    contestants: list[Contestant], measured: dict[str, list[tuple[float, float]]]
) -> list[dict[str, Any]]:
    rows = []
    for c in contestants:
        low, middle, high = quartiles([rate for rate, _ in measured[c.name]])
        images = c.images * statistics.median(units for _, units in measured[c.name])
        row = {"name": c.name, "batch": c.batch, "low": low, "median": middle, "high": high}
        rows.append(row | {"images_per_second": images})
        label = f"{c.name}, batch {c.batch}" if c.images != 1 else c.name
        span = f"({low:,.0f} to {high:,.0f})"
        seen = f"{images:>11,.0f}" if c.images else ""
        print(f"{label:36}{middle:>15,.0f}{span:>27}{seen}")
    return rows


def summary(measured: dict[str, list[tuple[float, float]]], batch: int) -> str:
    """Shares of the limit and the ratios to the naive loop, each round by round."""

    def ratio(one: str, other: str) -> str:
        pairs = zip(measured[one], measured[other], strict=True)
        low, middle, high = quartiles([a[0] / b[0] for a, b in pairs])
        return f"{middle:.2f} ({low:.2f} to {high:.2f})"

    return (
        f"  batch {batch}: share of the limit {ratio('tensor game', 'bare ViT')}, every block "
        f"{ratio('tensor game, every block', 'bare ViT, every block')}; over the naive loop "
        f"{ratio('tensor game, random', 'naive loop, one image')}, every block "
        f"{ratio('tensor game, random, every block', 'naive loop, every block, one image')}"
    )


def grown(rows: list[dict[str, Any]], *names: str) -> dict[str, dict[int, float]]:
    """Seconds per image of each batch size, relative to the smallest."""
    made: dict[str, dict[int, float]] = {}
    for name in names:
        cost = {r["batch"]: 1 / r["images_per_second"] for r in rows if r["name"] == name}
        least = cost[min(cost)]
        made[name] = {batch: value / least for batch, value in cost.items()}
        print(f"  {name:14}" + "".join(f"  {b}: {v:.2f}" for b, v in made[name].items()))
    return made


def of_side(side: int, args: argparse.Namespace) -> dict[str, float]:
    """Game and bare ViT on eight images of ``side`` x ``side`` pixels, one token per pixel."""
    backbone = Backbone(timm.create_model("digits_vit", img_size=side))
    backbone = backbone.to(args.device, check_dtype(args.dtype))
    source = open_source("digits", backbone.model, split="train", limit=16)
    game = build_game(model=backbone, data=source, batch_size=8)
    prepare(game)
    both = [bare(backbone, game, "bare ViT"), Contestant("game", 8, 8, keeping(game))]
    measured = measure(both, args.rounds, args.seconds, args.device)
    dense, whole = (
        [1e3 / (units * game.batch_size) for _, units in measured[name]]
        for name in ("bare ViT", "game")
    )
    low, middle, high = quartiles([a / b for a, b in zip(dense, whole, strict=True)])
    made = {
        "agents": game.agents, "bare_ms": statistics.median(dense),
        "game_ms": statistics.median(whole), "share": middle,
    }  # fmt: skip
    print(
        f"  {game.agents} agents: bare ViT {made['bare_ms']:.2f}, game {made['game_ms']:.2f}, "
        f"share {middle:.2f} ({low:.2f} to {high:.2f})"
    )
    return made


if __name__ == "__main__":
    run_script(main)
