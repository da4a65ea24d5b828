"""Learners of ``tokenenv suite run``: built in, saved in a run folder, or a user's own."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from agents.policies import POLICY, load, load_policy
from agents.policies.words import folder_of, parse_policy
from agents.systems.registry import SYSTEMS
from agents.systems.settings import preset, with_settings
from agents.training.run import CONFIG
from agents.training.start import train
from agents.training.trainer import CHECKPOINT
from tokenenv.artefact import read_object
from tokenenv.errors import UserError
from tokenenv.game.policy import as_method
from tokenenv.game.rewards import Damage
from tokenenv.own import load_own
from tokenenv.suite.opened import BEFORE_ATTENTION, OpenTask, chosen_values
from tokenenv.suite.results import HEURISTIC, RANDOM
from tokenenv.suite.sb3 import learn_with
from tokenenv.suite.tasks import POINTS, Task

Policies = dict[str, Any]
"""Policies by the setting that results hold; a single adjustable one is swept over thresholds."""


@dataclass(frozen=True)
class Means:
    """Model, images, device and precision that learners train with.

    Attributes:
        weights: of the task's model; None: the embedded weights or timm's.
        data: photographs to learn from, for tasks without images of their own.
        device: such as ``cpu`` or ``cuda``.
        dtype: precision of the model.
        evaluate_every: episodes between two stages of a learner's curve; 0: no curve.
        trust: whether a user's own code that a run folder's policy names may be run.
    """

    weights: str | None = None
    data: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    evaluate_every: int = 0
    trust: bool = False


Learn = Callable[[OpenTask, int, Path, Means], Policies]
"""A function of the task, the seed, a folder to write its run to, and what to train with."""


@dataclass(frozen=True)
class Learner:
    """A learner that ``--learner`` names.

    Attributes:
        name: as typed.
        learn: the function that makes its policies.
        summary: one line.
        rules: names of the rules that it can play; empty: all.
        deterministic: whether all seeds give the same policies, so that one is enough.
        trains: whether it trains in the precision that ``--dtype`` names.
        learnt_in: precision of a learner that does not; empty: that of the games it opens.
        code: fingerprint of a user's own code, so that results of other code are not reused.
        settings: the settings that it trains with on a task; results hold them.
        library: module that it needs and that the package does not; empty: none.
        extra: the extra that installs it.
    """

    name: str
    learn: Learn
    summary: str = ""
    rules: tuple[str, ...] = ()
    deterministic: bool = False
    trains: bool = False
    learnt_in: str = "float32"
    code: str = ""
    settings: Callable[[Task], dict[str, Any]] = lambda task: {}
    library: str = ""
    extra: str = ""

    def check(self, task: Task) -> None:
        """Raise :class:`UserError` if it can't play the task's game or its library is missing."""
        if self.library and importlib.util.find_spec(self.library) is None:
            raise UserError(
                f"learner '{self.name}' needs {self.library}: pip install 'tokenenv[{self.extra}]'"
            )
        if self.rules and task.rules not in self.rules:
            fits = ", ".join(
                one.name for one in BUILT_IN if task.rules in (one.rules or (task.rules,))
            )
            raise UserError(
                f"learner '{self.name}' does not play '{task.name}' ({task.environment}): "
                f"choose from {fits}"
            )


_FORMER = {"sb3-ppo": "sb3:ppo"}
"""Names of earlier versions, which older results have."""


def find_learner(name: str) -> Learner:
    """A learner by name.

    Raises:
        UserError: it is unknown, or a user's own can't be imported or is no function.
    """
    for learner in BUILT_IN:
        if learner.name == _FORMER.get(name, name):
            return learner
    folder = folder_of(name)
    if folder is not None:
        digest = hashlib.sha256((folder / POLICY).read_bytes()).hexdigest()[:16]
        return Learner(
            name,
            lambda opened, seed, folder, means: {"policy": load(name, means.trust)},
            deterministic=True,
            learnt_in=_learnt_in(folder),
            code=digest,
        )
    if ":" in name:
        return _own(name)
    known = ", ".join(learner.name for learner in BUILT_IN)
    raise UserError(
        f"unknown learner '{name}': choose from {known}, a shipped policy, a run folder or "
        "your own as module:function or path/to/file.py:function"
    )


def _learnt_in(folder: Path) -> str:
    """Precision that a run's config names; old configs name none and are float32."""
    try:
        found = read_object(folder / CONFIG, {"dtype": str | None}, "restore it")
        return found.get("dtype") or "float32"
    except UserError:
        return "unknown"


def _own(name: str) -> Learner:
    own = load_own(name)
    function = own.object
    if not callable(function):
        raise UserError(
            f"learner '{name}' can't be used: '{name.rpartition(':')[2]}' is {function!r:.60}, no "
            "function: give one of a task and a seed"
        )

    def learn(opened: OpenTask, seed: int, *_: Any) -> Policies:
        return checked(name, function(opened, seed))

    return Learner(name, learn, learnt_in="", code=own.origin.get("sha256", "")[:16])


def checked(name: str, returned: Any) -> Policies:
    """The policies that a user's function returned, by name.

    Raises:
        UserError: ``returned`` is neither a policy nor a list of 1 to :data:`POINTS` policies.
    """
    several = list(returned) if isinstance(returned, list | tuple) else [returned]
    policies = []
    for policy in several:
        try:
            policies.append(as_method(policy))
        except UserError:
            raise UserError(
                f"learner '{name}' returned {policy!r:.60}: return a policy, with rules, act and "
                "macs, a list of policies, or tokenenv.suite.policy_from(NETWORK, GAME)"
            ) from None
    if not 1 <= len(policies) <= POINTS:
        raise UserError(f"learner '{name}' returned {len(policies)} policies: return 1 to {POINTS}")
    return {f"policy {number}": policy for number, policy in enumerate(policies)}


def _sweep_of(pattern: Callable[[Task], str], seeded: bool) -> Learn:
    """A learner that returns a fixed policy at several values of its setting.

    The values are those of the task's grid or, where fronts are hulls, chosen as thresholds are.
    """

    def learn(opened: OpenTask, seed: int, *_: Any) -> Policies:
        task, depth = opened.spec, opened.backbone.depth
        words = pattern(task) + (f",seed={seed}" if seeded else "")

        def made(value: float) -> Any:
            return parse_policy(words.format(value), depth)

        values = chosen_values(opened, made) if task.front == "hull" else task.grid
        return {pattern(task).format(value): made(value) for value in values}

    return learn


def settings(task: Task, system: str, **changed: Any) -> Any:
    """Default settings of a system with the task's budget, blocks and target saving."""
    start: Any = preset(SYSTEMS[system].config, task.model)
    updates = task.budget // start.batch
    if system == "dora":
        changed = {"skip": 0.0, **changed}  # without blocks given, a task is played in all blocks
    if system == "rl4evit" and task.blocks[:1] == (0,):
        changed = _EARLY | changed
    if system == "rl4evit" and task.front == "hull":
        changed = {"labels": False, **changed}
    return with_settings(
        start,
        {
            "updates": updates,
            "evaluate_every": min(start.evaluate_every, updates),
            "blocks": task.blocks,
            "target_saving": task.target_saving,
            "calibrate": 0,  # the suite measures at many thresholds
            **changed,
        },
    )


_EARLY = {"features": BEFORE_ATTENTION, "lean": 0.0, "initial_keep": 0.45}
"""Settings of RL4EViT where the first decision is before any attention.

Chosen on validation scenes, with one seed, for the range of ``scenes-prune-v1``.
"""

_TRAINED = {"token_prune": "rl4evit", "layer_merge": "dora", "layer_prune": "dora-prune"}
"""The system that trains under the rules of that name."""


def _trained(name: str, system: str, summary: str, rules: str, **changed: Any) -> Learner:
    """A learner that trains a system of ``tokenenv train``, resuming the run in its folder."""

    def learn(opened: OpenTask, seed: int, folder: Path, means: Means) -> Policies:
        task = opened.spec
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "train.log", "a") as log, contextlib.redirect_stdout(log):
            run = train(
                system,
                model=task.model,
                weights=means.weights,
                data=means.data or task.data,
                out=folder,
                seed=seed,
                device=means.device,
                dtype=means.dtype,
                resume=(folder / CHECKPOINT).is_file(),
                after_update=_keep_stages(opened, folder, settings(task, system, **changed).batch),
                **vars(settings(task, system, **changed)),
            )
        if run.stopped:
            raise KeyboardInterrupt
        return {"policy": run.policy}

    def used(task: Task) -> dict[str, Any]:
        return {"system": system, **vars(settings(task, system, **changed))}

    return Learner(name, learn, summary, (rules,), trains=True, settings=used)


def _keep_stages(opened: OpenTask, folder: Path, batch: int) -> Callable[[int, Any], None]:
    """A function that keeps the stages of a training, in files, so that a resumed run has all."""
    for path in sorted(folder.glob("stage-*.safetensors")):
        opened.keep_stage(partial(load_policy, path), episodes=int(path.stem.partition("-")[2]))

    def after_update(updates: int, policy: Any) -> None:
        def frozen() -> Any:
            path = folder / f"stage-{updates * batch:010d}.safetensors"
            policy.save(path)
            return load_policy(path)

        opened.keep_stage(frozen, episodes=updates * batch)

    return after_update


def _untrained(opened: OpenTask, seed: int, *_: Any) -> Policies:
    """The policy that training starts from, without any update."""
    task = opened.spec
    config = settings(task, _TRAINED[task.rules])
    torch.manual_seed(seed)
    game = config.game(opened.backbone, opened.train)
    return {"policy": config.policy(game, task.model).eval()}


def _damage(task: Task) -> Damage:
    """The kind of damage in the reward of DORA's default settings for the task."""
    found: Damage = settings(task, _TRAINED[task.rules]).damage
    return found


def _sb3(name: str, algorithm: str, summary: str) -> Learner:
    return Learner(
        name,
        learn_with(algorithm, _damage),
        summary,
        ("layer_merge", "layer_prune"),
        trains=True,
        library="stable_baselines3",
        extra="sb3",
    )


def _benchmarl(algorithm: str, summary: str) -> Learner:
    def learn(opened: OpenTask, seed: int, folder: Path, means: Means) -> Policies:
        from tokenenv.suite import benchmarl

        return {"policy": benchmarl.learn(algorithm, opened, seed, folder, means.dtype)}

    def used(task: Task) -> dict[str, Any]:
        from tokenenv.suite import benchmarl

        return benchmarl.settings(algorithm, task)

    return Learner(
        f"benchmarl:{algorithm}",
        learn,
        summary,
        ("token_prune",),
        trains=True,
        settings=used,
        library="benchmarl",
        extra="benchmarl",
    )


BUILT_IN = (
    Learner(RANDOM, _sweep_of(lambda task: task.random, True), "random decisions; score 0"),
    Learner(
        HEURISTIC,
        _sweep_of(lambda task: task.heuristic, False),
        "class attention where tokens are pruned, ToMe where they merge",
        deterministic=True,
    ),
    Learner(
        "untrained",
        _untrained,
        "the policies that training starts from, untrained",
        tuple(_TRAINED),
    ),
    _trained(
        "ippo", "rl4evit", "RL4EViT's preset without the centralised critic", "token_prune",
        centralised=False,
    ),
    _trained("mappo", "rl4evit", "RL4EViT's preset", "token_prune"),
    _trained(
        "alpha-beta", "rl4evit", "RL4EViT's preset with the paper's reward", "token_prune",
        reward="alpha_beta", beta=0.1, closed_loop=False,
    ),
    _trained("dora", "dora", "DORA's preset, PPO", "layer_merge"),
    _sb3("sb3:ppo", "ppo", "stable-baselines3's PPO on counts (extra sb3)"),
    _sb3("sb3:a2c", "a2c", "its A2C"),
    _sb3("sb3:dqn", "dqn", "its DQN"),
    _benchmarl("mappo", "BenchMARL's MAPPO (extra benchmarl)"),
    _benchmarl("ippo", "its IPPO"),
    _benchmarl("qmix", "its QMIX"),
    _benchmarl("vdn", "its VDN"),
)  # fmt: skip
"""The built-in learners; each stays within the task's budget."""
