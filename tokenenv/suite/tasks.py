"""The suite's tasks: game, images, training budget, and the range of cost that is measured."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from tokenenv.data.opening import EMBEDDED_DATA
from tokenenv.errors import UserError

POINTS = 10
"""Most points of a learner on one task and seed; with more, the best would be partly luck."""


@dataclass(frozen=True)
class Task:
    """A task of the suite. Every change that affects results raises the version in its name.

    A learner plays ``budget`` episodes of one image each on the training images and returns at most
    :data:`POINTS` deterministic policies, or one with a threshold. They are measured on the test
    images and scored by :mod:`tokenenv.suite.score`.

    Attributes:
        name: name with version.
        level: ``easy``, ``medium`` or ``hard``.
        environment: registered id of the game.
        rules: name of the rules for :func:`~tokenenv.game.build.build_game`.
        blocks: the decision blocks; empty: the game's default.
        model: timm's name of the frozen backbone.
        data: ``digits`` or ``scenes``; or empty: the user gives folders of photographs.
        test_images: largest number of test images, balanced over the classes as far as possible.
        budget: training episodes, one image each; evaluations are not counted.
        agents: number of agents at the start of an episode.
        decisions: decisions per episode.
        seeds: number of runs of a learner, with seeds 0, 1, ...
        low, high: range of cost over which top-1 is averaged: multiply-adds, policy included, as a
            share of the dense model's.
        random, heuristic: reference policies in the words of :func:`agents.parse_policy`, with
            ``{}`` in place of a value of ``grid``.
        grid: at most :data:`POINTS` values; where ``front`` is ``hull`` the two ends between which
            values are chosen on training images, as learners' thresholds are.
        description: one line.
        front: how points become a front, see :mod:`tokenenv.suite.score`: ``steps`` in version 0
            of the package's tasks, ``hull`` in later ones.
    """

    name: str
    level: Literal["easy", "medium", "hard"]
    environment: str
    rules: str
    model: str
    data: str
    test_images: int
    budget: int
    agents: int
    decisions: int
    low: float
    high: float
    random: str
    heuristic: str
    grid: tuple[float, ...]
    description: str
    blocks: tuple[int, ...] = ()
    seeds: int = 5
    front: Literal["steps", "hull"] = "steps"

    @property
    def agent_steps(self) -> int:
        """The budget in decisions of single agents, if no token is pruned."""
        return self.budget * self.decisions * self.agents

    @property
    def embedded(self) -> bool:
        """Whether the package contains the model and the images."""
        return self.data in EMBEDDED_DATA

    @property
    def target_saving(self) -> float:
        """Saving at the middle of the range, percent of MACs; for learners with a target."""
        return round(100 * (1 - (self.low + self.high) / 2), 3)

    def settings(self) -> dict[str, Any]:
        """The task's settings as JSON; only results under the same settings are compared."""
        described = {k: v for k, v in asdict(self).items() if k not in ("description", "level")}
        if self.front == "steps":  # once there was no other
            del described["front"]
        settings: dict[str, Any] = json.loads(json.dumps(described))
        return settings


_PRUNE: dict[str, Any] = {
    "environment": "tokenenv/TokenPrune-v0",
    "rules": "token_prune",
    "decisions": 3,
    "random": "random:keep={}",
    "heuristic": "cls-attention:keep={}",
}
_MERGE: dict[str, Any] = {
    "environment": "tokenenv/LayerMerge-v0",
    "rules": "layer_merge",
    "decisions": 12,
    "agents": 1,
    "random": "random-merge:r={:g}",
    "heuristic": "tome:r={:g}",
}
_DIGITS: dict[str, Any] = {"model": "digits_vit", "data": "digits", "test_images": 600}
_SCENES: dict[str, Any] = {"model": "scenes_vit", "data": "scenes", "test_images": 4000}
_DEIT: dict[str, Any] = {"model": "deit_tiny_patch16_224", "data": "", "test_images": 300}

TASKS = [
    Task(
        name="digits-prune-v0", level="easy", **_PRUNE, **_DIGITS, agents=64, budget=8192,
        low=0.28, high=0.6, grid=(0.7, 0.6, 0.5, 0.4, 0.33, 0.26, 0.2, 0.14, 0.08, 0.03),
        description="an agent per pixel of a digit; random pruning is hard to beat above 0.5",
    ),
    Task(
        name="digits-merge-v0", level="easy", **_MERGE, **_DIGITS, budget=6144,
        low=0.2, high=0.37, grid=(6, 7, 8, 10, 12, 14, 16, 20, 24, 32),
        description="an agent per block of a small ViT on digits says what merges",
    ),
    Task(
        name="scenes-prune-v0", level="easy", agents=144, budget=12800, low=0.2, high=0.5,
        blocks=(1, 2, 4), **_SCENES, **_PRUNE | {
            "random": "random:keep={},blocks=1/2/4",
            "heuristic": "cls-attention:keep={},blocks=1/2/4",
        },
        grid=(0.7, 0.62, 0.55, 0.48, 0.42, 0.36, 0.3, 0.24, 0.18, 0.1),
        description="an agent per patch of a digit among clutter, which decide early",
    ),
    Task(
        name="scenes-merge-v0", level="easy", budget=7680, low=0.3, high=0.6, **_SCENES,
        **_MERGE | {"decisions": 8}, grid=(14, 16, 18, 20, 23, 26, 30, 35, 42, 56),
        description="an agent per block of a small ViT on a digit among clutter says what merges",
    ),
    Task(
        name="deit-tiny-prune-v0", level="medium", **_PRUNE, **_DEIT, agents=196, budget=20480,
        low=0.5, high=0.95, grid=(0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5),
        description="an agent per patch of a photograph; DeiT-Tiny with its ImageNet weights",
    ),
    Task(
        name="deit-tiny-merge-v0", level="medium", **_MERGE, **_DEIT, budget=15360,
        low=0.52, high=0.9, grid=(3, 5, 7, 9, 11, 12, 13, 14, 15, 16),
        description="an agent per block of DeiT-Tiny says which patches merge",
    ),
    Task(
        name="digits-large-prune-v0", level="hard", data="digits", model="digits_vit_16",
        test_images=600, budget=8192, agents=256, low=0.11, high=0.3, blocks=(1, 3, 5),
        **_PRUNE | {
            "random": "random:keep={},blocks=1/3/5",
            "heuristic": "cls-attention:keep={},blocks=1/3/5",
        },
        grid=(0.6, 0.5, 0.42, 0.35, 0.28, 0.22, 0.17, 0.12, 0.08, 0.04),
        description="256 agents that decide early, on digits of 16x16 pixels",
    ),
]  # fmt: skip
"""All tasks; those registered later at the end."""


def _task(name: str) -> Task:
    return next(task for task in TASKS if task.name == name)


_KEEP, _PAIRS = (0.01, 1.0), (0, 72)
_SECOND: list[tuple[str, dict[str, Any]]] = [
    ("digits-prune", {"grid": _KEEP}),
    ("digits-merge", {"grid": (0, 32), "random": "random-merge:r={:.0f}",
                      "heuristic": "tome:r={:.0f}"}),
    ("scenes-prune", {
        "blocks": (0, 1, 3), "low": 0.12, "high": 0.32, "grid": _KEEP,
        "random": "random:keep={},blocks=0/1/3", "heuristic": "cls-attention:keep={},blocks=1/3",
        "description": "an agent per patch of a digit among clutter; the first decision is before "
        "any attention",
    }),
    ("scenes-merge", {"low": 0.22, "high": 0.28, "grid": _PAIRS,
                      "random": "random-merge:r={:.0f}", "heuristic": "tome:r={:.0f}"}),
    ("deit-tiny-prune", {"grid": _KEEP}),
    ("deit-tiny-merge", {"grid": (0, 98), "random": "random-merge:r={:.0f}",
                         "heuristic": "tome:r={:.0f}"}),
    ("digits-large-prune", {"grid": _KEEP}),
]  # fmt: skip
TASKS += [
    replace(_task(f"{stem}-v0"), name=f"{stem}-v1", front="hull", **changed)
    for stem, changed in _SECOND
]
TASKS.append(
    replace(
        _task("scenes-prune-v1"), name="scenes-large-prune-v1", level="hard",
        model="scenes_vit_patch2", agents=576, budget=6400, low=0.06, high=0.2,
        description="576 agents on a digit among clutter, four for each of scenes-prune's",
    )
)  # fmt: skip


def register_task(task: Task) -> Task:
    """Add a task of one's own to the suite; the same task may be registered again.

    Returns:
        The task.

    Raises:
        UserError: the name is taken or has no version, the range is empty, or the grid has no
            value or more than :data:`POINTS`.
    """
    known = next((other for other in TASKS if other.name == task.name), None)
    if known == task:
        return known
    problem = ""
    if known is not None:
        problem = "exists already with other settings: raise its version or give another name"
    elif not re.fullmatch(r"[\w.-]+-v\d+", task.name):
        problem = "has no version: end its name with -v0"
    elif not 0 < task.low < task.high <= 1:
        problem = f"has the range {task.low:g} to {task.high:g}: give 0 < low < high <= 1"
    elif task.front == "hull" and not (len(task.grid) == 2 and task.grid[0] < task.grid[1]):
        problem = f"has the grid {task.grid}: give the two ends of a range"
    elif not 1 <= len(task.grid) <= POINTS:
        problem = f"has a grid of {len(task.grid)} values: give 1 to {POINTS}"
    if problem:
        raise UserError(f"task '{task.name}' {problem}")
    TASKS.append(task)
    return task


def find_task(name: str) -> Task:
    """A task by name.

    Raises:
        UserError: there is no such task, or only another version of it.
    """
    for task in TASKS:
        if task.name == name:
            return task
    stem, known = name.rpartition("-v")[0], ", ".join(task.name for task in TASKS)
    other = next((task.name for task in TASKS if stem and task.name.startswith(f"{stem}-v")), None)
    if other:
        raise UserError(f"task '{name}' is another version's: this one has '{other}'")
    raise UserError(
        f"unknown task '{name}': choose from {known}; yours needs tokenenv.suite.register_task"
    )
