"""Our MAPPO and TorchRL's on two tasks of MPE2, with the same copies, seeds, budget and settings.

    pip install 'tokenenv[mpe2]'
    python benchmarks/mpe2_mappo.py --out mpe2-mappo

Tasks: simple_spread_v3 (3 agents, 5 actions) and simple_reference_v3 (2 agents, 50 actions), with
MPE2's own defaults. A time limit truncates episodes after 25 steps, and both learners bootstrap
there. Both play the same :class:`agents.PettingZooArena`, so only the learners differ:

- ours: :class:`agents.MAPPO` with its own networks (LayerNorm, ReLU, orthogonal start; the critic
  sees the agent's own view and the state), normalised and clipped values, advantages normalised
  over all agents, an optimiser each for actor and critic;
- TorchRL's: ``MAPPOLoss`` (its ``ClipPPOLoss`` for many agents) with ``PopArtValueNorm``,
  ``MultiAgentGAE`` and ``MultiAgentMLP`` as in its documentation and multi-agent tutorial (tanh;
  actor on the own view, critic on all views, parameters shared), advantages normalised for each
  agent apart, one optimiser.

:class:`Settings` are used for both; neither is tuned separately. A discount of 0.99 instead of 0.95
was worse for both (one seed of simple_spread_v3): values then grow to a hundred times the reward
of a step, and TorchRL's critic explained none of their variance after 24,000 steps.

The table has returns of training episodes, summed over an episode, mean over its agents. "final" is
the mean over the last tenth of the budget, "area" over the whole budget, "start" over the first
update; each is the mean over the seeds, with lowest and highest in brackets. Seconds are processor
time of one thread, games included.

Every finished run is a JSON file in --out and is not repeated, so after Ctrl-C the same command
resumes. The folder also gets summary.json and curves.png.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from agents import MAPPO, ActorPolicy, MAPPOConfig, PettingZooArena
from agents.policies.actor import Widths
from tokenenv.data.pixels import one_line
from tokenenv.errors import UserError
from tokenenv.game.figures import new_figure
from tokenenv.game.rules import Observation, TokenPrune
from tokenenv.storage import writable_folder, write_json

TASKS = ("simple_spread_v3", "simple_reference_v3")
CYCLES = 25


@dataclass(frozen=True)
class Settings:
    """The settings of both learners.

    Attributes:
        steps: budget in environment steps of all copies together; not in agent-steps.
        copies: number of environments played in parallel.
        episodes: episodes of each copy per update.
        epochs, minibatches: passes over a rollout, minibatches per pass.
        lr: Adam's learning rate for actor and critic; its epsilon is 1e-5.
        gamma, lam: discount and GAE's lambda.
        clip, entropy: PPO's epsilon and the weight of the entropy bonus.
        hidden: widths of the hidden layers, of actor and critic.
        max_grad_norm: largest gradient norm.
    """

    steps: int = 64_000
    copies: int = 16
    episodes: int = 2
    epochs: int = 10
    minibatches: int = 4
    lr: float = 7e-4
    gamma: float = 0.95
    lam: float = 0.95
    clip: float = 0.2
    entropy: float = 0.01
    hidden: tuple[int, int] = (64, 64)
    max_grad_norm: float = 10.0

    @property
    def per_update(self) -> int:
        """Environment steps of one update."""
        return self.copies * self.episodes * CYCLES

    @property
    def updates(self) -> int:
        """Number of updates in the budget, at least one."""
        return max(1, self.steps // self.per_update)


def ours(arena: PettingZooArena, settings: Settings, seed: int) -> Iterator[float]:
    """Mean return of each update's episodes, learner :class:`agents.MAPPO`."""
    widths = Widths(arena.agent_dim, arena.shared_dim, arena.state_dim)
    policy = ActorPolicy(
        TokenPrune(), widths, hidden=settings.hidden, actions=arena.actions,
        initial=1 / arena.actions,
    )  # fmt: skip
    config = MAPPOConfig(
        steps=settings.episodes * CYCLES, epochs=settings.epochs,
        minibatches=settings.minibatches, gamma=settings.gamma, lam=settings.lam,
        clip=settings.clip, actor_lr=settings.lr, critic_lr=settings.lr,
        entropy=settings.entropy, max_grad_norm=settings.max_grad_norm, hidden=settings.hidden,
    )  # fmt: skip
    learner = MAPPO(policy, arena, config, seed=seed)
    while True:
        yield learner.update()["reward"]


def torchrls(arena: PettingZooArena, settings: Settings, seed: int) -> Iterator[float]:
    """Mean return of each update's episodes, learner TorchRL's MAPPO."""
    from tensordict.nn import InteractionType, TensorDictModule
    from torchrl.modules import MultiAgentMLP, PopArtValueNorm, ProbabilisticActor
    from torchrl.objectives.multiagent import MAPPOLoss

    def network(outputs: int, centralised: bool) -> nn.Module:
        return MultiAgentMLP(
            arena.agent_dim, outputs, arena.agents, centralized=centralised, share_params=True,
            depth=len(settings.hidden), num_cells=settings.hidden, activation_class=nn.Tanh,
        )  # fmt: skip

    views = [("agents", "observation")]
    actor = ProbabilisticActor(
        TensorDictModule(network(arena.actions, False), views, [("agents", "logits")]),
        in_keys={"logits": ("agents", "logits")},
        out_keys=[("agents", "action")],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
        log_prob_key=("agents", "log_prob"),
        default_interaction_type=InteractionType.RANDOM,  # its default is the likeliest action
    )
    critic = TensorDictModule(network(1, True), views, [("agents", "state_value")])
    loss = MAPPOLoss(
        actor, critic, value_norm=PopArtValueNorm(shape=1), clip_epsilon=settings.clip,
        entropy_coeff=settings.entropy,
    )  # fmt: skip
    loss.set_keys(
        action=("agents", "action"),
        sample_log_prob=("agents", "log_prob"),
        value=("agents", "state_value"),
        **{name: ("agents", name) for name in ("reward", "done", "terminated")},
    )
    loss.make_value_estimator(gamma=settings.gamma, lmbda=settings.lam)
    optimiser = torch.optim.Adam(loss.parameters(), settings.lr, eps=1e-5)
    observation = arena.reset()
    while True:
        data, observation = play(arena, actor, observation, settings.episodes * CYCLES)
        with torch.no_grad():
            loss.value_estimator(data)
        flat = data.reshape(-1)
        for _ in range(settings.epochs):
            for index in torch.randperm(len(flat)).chunk(settings.minibatches):
                terms = loss(flat[index])
                optimiser.zero_grad()
                (terms["loss_objective"] + terms["loss_critic"] + terms["loss_entropy"]).backward()
                nn.utils.clip_grad_norm_(loss.parameters(), settings.max_grad_norm)
                optimiser.step()
        finished = data["next", "agents", "done"][:, :, 0].sum()
        yield (data["next", "agents", "reward"].mean(2).sum() / finished).item()


@torch.no_grad()
def play(
    arena: PettingZooArena, actor: Any, observation: Observation, steps: int
) -> tuple[Any, Observation]:
    """``(B, T)`` transitions in TorchRL's form, and the observation after them."""
    from tensordict import TensorDict

    rows = []
    size, shape = arena.batch_size, (arena.batch_size, arena.agents, 1)
    for _ in range(steps):
        row = actor(TensorDict({"agents": {"observation": observation.agents}}, [size]))
        step = arena.step(row["agents", "action"])
        seen, over = step.observation.agents, step.done[:, None].expand(-1, arena.agents)
        cut = torch.zeros_like(over)
        if step.cut is not None:
            cut = step.cut.active
            seen = torch.where(cut[..., None], step.cut.agents, seen)
        after = {"observation": seen, "reward": step.reward[..., None]}
        ends = {"done": over.reshape(shape), "terminated": (over & ~cut).reshape(shape)}
        row["next"] = TensorDict({"agents": after | ends}, [size])
        rows.append(row)
        observation = step.observation
    return torch.stack(rows, 1), observation


LEARNERS: dict[str, Callable[[PettingZooArena, Settings, int], Iterator[float]]] = {
    "tokenenv": ours,
    "torchrl": torchrls,
}


def train(
    task: str, learner: str, seed: int, settings: Settings, progress: Callable[[int], Any]
) -> dict[str, Any]:
    """Train one learner on one task with one seed.

    Args:
        task: one of :data:`TASKS`.
        learner: one of :data:`LEARNERS`.
        seed: seed of the copies, the networks and the actions.
        settings: settings of the run.
        progress: called with the environment steps of each update.

    Returns:
        The run's JSON; ``curve`` is the mean return of each update's episodes.
    """
    module = importlib.import_module(f"mpe2.{task}")
    # A thousand apart, so that the copies of two seeds have no seed in common.
    arena = PettingZooArena(
        lambda: module.parallel_env(max_cycles=CYCLES), settings.copies, seed=1000 * seed
    )
    torch.manual_seed(seed)
    returns = LEARNERS[learner](arena, settings, seed)
    curve: list[float] = []
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(settings.updates):
        curve.append(next(returns))
        progress(settings.per_update)
    return {
        "task": task,
        "learner": learner,
        "seed": seed,
        "settings": as_json(settings),
        "versions": {name: version(name) for name in ("torch", "mpe2", "tokenenv", learner)},
        "seconds": time.process_time() - processor,
        "wall_seconds": time.perf_counter() - wall,
        "curve": curve,
    }


def as_json(settings: Settings) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(settings)))


def read(path: Path, settings: Settings) -> dict[str, Any] | None:
    """A finished run, or None if there is none.

    Raises:
        UserError: it can't be read, or was made with other settings.
    """
    if not path.exists():
        return None
    try:
        run = json.loads(path.read_text())
        known, wanted = run["settings"], as_json(settings)
        other = [name for name in wanted if known[name] != wanted[name]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the run '{path}' ({one_line(error)}): remove it") from None
    if other:
        name = other[0]
        raise UserError(
            f"'{path}' was made with {name}={known[name]}, not {wanted[name]}: choose another "
            "--out, or remove it"
        )
    return run


def library(name: str) -> None:
    """Check that a library can be imported.

    Raises:
        UserError: it cannot.
    """
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"cannot use {name} ({one_line(error)}): pip install 'tokenenv[mpe2]'"
        ) from None


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``[mean, lowest, highest]`` over the seeds of each number, for each task and learner."""
    rows = []
    for task, learner in dict.fromkeys((run["task"], run["learner"]) for run in runs):
        own = [r for r in runs if (r["task"], r["learner"]) == (task, learner)]
        curves = np.array([run["curve"] for run in own])
        tail = max(1, curves.shape[1] // 10)
        numbers = {
            "start": curves[:, 0],
            "final": curves[:, -tail:].mean(1),
            "area": curves.mean(1),
            "seconds": np.array([run["seconds"] for run in own]),
        }
        spread = {k: [float(v.mean()), float(v.min()), float(v.max())] for k, v in numbers.items()}
        rows.append({"task": task, "learner": learner, "seeds": len(own), **spread})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'task':21}{'learner':10}{'seeds':>5}   start   final [low, high]          "
             "area [low, high]           seconds"]  # fmt: skip
    for row in rows:
        final, area = (
            f"{'{:7.2f} [{:.2f}, {:.2f}]'.format(*row[k]):27}" for k in ("final", "area")
        )
        lines.append(
            f"{row['task']:21}{row['learner']:10}{row['seeds']:5d} {row['start'][0]:7.2f} "
            f"{final}{area}{row['seconds'][0]:7.0f}"
        )
    return "\n".join(lines)


def draw(path: Path, runs: list[dict[str, Any]]) -> None:
    """One panel per task: mean and range over the seeds, a running mean of 5 updates."""
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    figure = new_figure(5.2 * len(tasks), 3.8)
    for axis, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for number, learner in enumerate(LEARNERS):
            own = [r for r in runs if (r["task"], r["learner"]) == (task, learner)]
            if not own:
                continue
            settings = own[0]["settings"]
            window = min(5, len(own[0]["curve"]))
            smooth = np.array(
                [np.convolve(run["curve"], np.ones(window) / window, "valid") for run in own]
            )
            per_update = settings["copies"] * settings["episodes"] * CYCLES
            steps = per_update * (window + np.arange(smooth.shape[1])) / 1000
            colour, label = f"C{number}", f"{learner}, {len(own)} seed{'s' * (len(own) > 1)}"
            axis.fill_between(steps, smooth.min(0), smooth.max(0), color=colour, alpha=0.2, lw=0)
            axis.plot(steps, smooth.mean(0), color=colour, lw=1.4, label=label)
        axis.set_title(f"{task}: return of an episode, per agent", fontsize=10)
        axis.set_xlabel("environment steps, thousands")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Train, print the table, write summary and picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="where the runs are kept")
    parser.add_argument("--tasks", default="/".join(TASKS), metavar="A/B", help="default: both")
    parser.add_argument(
        "--learners", default="/".join(LEARNERS), metavar="A/B", help="default: both"
    )
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument(
        "--steps", type=int, default=Settings.steps, metavar="N",
        help=f"environment steps of a run; default: {Settings.steps}",
    )  # fmt: skip
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # the networks are tiny, and a seed must give the same run anywhere
    try:
        return run(args)
    except UserError as error:
        print(f"mpe2_mappo: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    """The work of :func:`main`, with the user's mistakes raised as ``UserError``."""
    tasks = choose("task", args.tasks, TASKS)
    learners = choose("learner", args.learners, tuple(LEARNERS))
    settings = Settings(steps=args.steps)
    for option, value, least in (
        ("seeds", args.seeds, 1),
        ("steps", args.steps, settings.per_update),
    ):
        if value < least:
            raise UserError(f"--{option} {value} is too small; use at least {least}")
    for name in ("mpe2", *(["torchrl.objectives.multiagent"] if "torchrl" in learners else [])):
        library(name)
    # Seed by seed, so that all tasks and learners have about as many runs if stopped early.
    wanted = [(t, k, s) for s in range(args.seeds) for t in tasks for k in learners]
    out = Path(args.out)
    with writable_folder(out):
        paths = {one: out / "{}-{}-{}.json".format(*one) for one in wanted}
        runs = {one: found for one in wanted if (found := read(paths[one], settings)) is not None}
        interrupted = finish(wanted, runs, paths, settings)
        done = [runs[one] for one in wanted if one in runs]
        if done:
            rows = summarise(done)
            print(table(rows))
            write_json(out / "summary.json", {"settings": as_json(settings), "rows": rows})
            draw(out / "curves.png", done)
            print(f"runs, summary.json and curves.png are in {out}")
    if interrupted:
        print(f"interrupted: {len(done)} of {len(wanted)} runs are done; the same command goes on")
    return 130 if interrupted else 0


Which = tuple[str, str, int]


def finish(
    wanted: list[Which],
    runs: dict[Which, dict[str, Any]],
    paths: dict[Which, Path],
    settings: Settings,
) -> bool:
    """Make the runs that are missing; True if interrupted by Ctrl-C."""
    size = settings.updates * settings.per_update
    with tqdm(total=size * len(wanted), initial=size * len(runs), unit="step", disable=None) as bar:
        try:
            for one in wanted:
                if one not in runs:
                    bar.set_description("{} {} {}".format(*one))
                    run = train(*one, settings, bar.update)
                    write_json(paths[one], run)
                    runs[one] = run
        except KeyboardInterrupt:
            return True
    return False


def choose(kind: str, text: str, known: tuple[str, ...]) -> list[str]:
    """``"A/B"`` -> ``["A", "B"]``, each once.

    Raises:
        UserError: an unknown one.
    """
    names = list(dict.fromkeys(text.split("/")))
    for name in names:
        if name not in known:
            raise UserError(f"unknown {kind} '{name}': choose from {', '.join(known)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
