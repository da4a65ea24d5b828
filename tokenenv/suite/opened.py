"""A task with its backbone and images: the games for a learner, and the points of its policies."""

from __future__ import annotations

import contextlib
import copy
import filecmp
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenenv.data import ImageSource, open_source
from tokenenv.envs.ids import vector_class
from tokenenv.envs.token_prune_pettingzoo import parallel_env
from tokenenv.envs.vector_base import GameVectorEnv
from tokenenv.errors import UserError
from tokenenv.game import Game
from tokenenv.game.build import build_game, build_rules
from tokenenv.game.policy import Method, Policy
from tokenenv.measure import evaluation
from tokenenv.suite.results import Point, hits
from tokenenv.suite.stages import Stages
from tokenenv.suite.tasks import POINTS, Task
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.load import check_dtype, load_backbone

_SAMPLE = 128  # training images on which the cost of a threshold is measured
_WIDEST, _CLOSEST = 16.0, 1e-3  # log-odds of thresholds: range -16 to 16, smallest distance
_TRIES = 3 * POINTS

BEFORE_ATTENTION = ("token", "position", "progress", "norm")
"""Features of games whose first decision is before any attention, unless a learner names others."""
_BATCH = 64


@dataclass
class OpenTask:
    """A task as a learner gets it, with model and images.

    Attributes:
        spec: the task: budget, name, settings.
        backbone: the frozen model.
        train: training images.
        test: test images, on which policies are measured; not for training.
        played: episodes that were started in games made by :meth:`game`.
        learnt_in: the precisions of those games' models.
        stages: the policies of :meth:`keep_stage`.
    """

    spec: Task
    backbone: Backbone
    train: ImageSource
    test: ImageSource
    played: int = 0
    learnt_in: set[str] = field(default_factory=set)
    stages: Stages = field(default_factory=Stages)

    def game(self, dtype: str = "float32", **options: Any) -> Game:
        """The task's game on the training images; every episode counts against the budget.

        Args:
            dtype: precision of the game's model; a copy is made unless it is float32, the
                precision in which policies are measured.
            **options: arguments of :func:`~tokenenv.game.build.build_game` other than model,
                images, rules and blocks, which the task fixes: ``batch_size``, ``reward``,
                ``reward_kwargs``, ``features`` ...

        Raises:
            UserError: unknown options, or options that the task fixes; in ``reset``: the budget is
                spent.
        """
        fixed = {"rules": self.spec.rules, **self.options, "model": self.model_in(dtype)}
        game = build_game(**self._own(fixed, options))
        self.learnt_in.add(str(game.backbone.dtype).removeprefix("torch."))
        game.on_reset = self._count
        return game

    def _count(self, episodes: int) -> None:
        self.played += episodes
        self.check_budget()

    def make_vec(self, num_envs: int = 64, **options: Any) -> GameVectorEnv:
        """The task's ``gymnasium.vector.VectorEnv``; its episodes count against the budget.

        An episode counts when the next one starts, since the environment starts it in the step
        that ends the last.

        Args:
            num_envs: images in one batch.
            **options: arguments as for ``gymnasium.make_vec``, but for model, images and blocks.

        Raises:
            UserError: in ``reset`` and ``step``: the budget is spent.
        """
        envs = vector_class(self.spec.environment)(num_envs, **self._own(self.options, options))
        envs.game.on_reset = self._count_ended()
        return envs

    def parallel_env(self, **options: Any) -> Any:
        """The task's PettingZoo parallel environment; as :meth:`make_vec`.

        Raises:
            UserError: the game has a single agent; in ``reset``: the budget is spent.
        """
        if self.spec.rules != "token_prune":
            raise UserError(f"task '{self.spec.name}' has no parallel environment: use make_vec")
        env = parallel_env(**self._own(self.options, options))
        env.game.on_reset = self._count_ended()
        return env

    def torchrl_env(self, num_envs: int = 64, dtype: str = "float32", **options: Any) -> Any:
        """The task's TorchRL environment; as :meth:`make_vec`.

        Args:
            num_envs: images in one batch.
            dtype: precision of the model, see :meth:`game`.
            **options: arguments of :func:`~tokenenv.game.build.build_game`, but for model, images,
                rules and blocks.

        Raises:
            UserError: TorchRL is not installed; when an episode starts: the budget is spent.
        """
        from tokenenv.envs.torchrl import TorchRLEnv  # says what to install

        fixed = {**self.options, "model": self.model_in(dtype)}
        env = TorchRLEnv(self.spec.environment, num_envs, **self._own(fixed, options))
        env.game.on_reset = self._count_ended()
        return env

    def keep_stage(
        self, frozen: Callable[[], Method], *, episodes: int | None = None, part: str = "policy"
    ) -> None:
        """Keep the policy in training for the learner's curve, where ``--evaluate-every`` asks.

        To be called after every update, and once before the first. The policies that are kept are
        measured after the training.

        Args:
            frozen: called where a stage is due: a policy that further training does not change,
                such as ``lambda: copy.deepcopy(policy)``.
            episodes: how many were played so far; None: those counted by the task.
            part: which policy this is, if the learner returns several.
        """
        played = self.played if episodes is None else episodes
        if played < self.spec.budget and self.stages.due(played, part):
            self.stages.keep(played, part, frozen())

    def _own(self, fixed: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        """A learner's arguments and those that the task fixes; features may be chosen anew."""
        own = sorted(fixed.keys() & options.keys() - {"features"})
        if own:
            raise UserError(f"task '{self.spec.name}' has its own {', '.join(own)}: leave it out")
        return fixed | options

    def _count_ended(self) -> Callable[[int], None]:
        """Counts the episodes that were started before the ones that start now."""
        before = 0

        def count(episodes: int) -> None:
            nonlocal before
            self._count(before)
            before = episodes

        return count

    def model_in(self, dtype: str) -> Backbone:
        """The backbone in precision ``dtype``; a copy unless that is float32."""
        if dtype == "float32":
            return self.backbone
        return copy.deepcopy(self.backbone).to(check_dtype(dtype))

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of the task's environments: ``gymnasium.make(spec.environment, **options)``.

        Episodes of such environments are not counted, so the learner has to keep to the budget;
        those of :meth:`make_vec` and :meth:`parallel_env` are.
        """
        fixed = {"model": self.backbone, "data": self.train, "blocks": self.spec.blocks or None}
        if self.spec.rules == "token_prune" and self.spec.blocks[:1] == (0,):
            return fixed | {"features": BEFORE_ATTENTION}
        return fixed

    def check_budget(self) -> None:
        """Raise :class:`UserError` if more episodes were played than the task allows."""
        if self.played > self.spec.budget:
            raise UserError(
                f"the learner plays {self.played} episodes of '{self.spec.name}', whose budget is "
                f"{self.spec.budget}: stop earlier"
            )

    def check_policy(self, policy: Policy) -> None:
        """Raise :class:`UserError` unless the policy plays this task's game on its model."""
        own = build_rules(self.spec.rules, self.backbone.depth, self.spec.blocks or None, None, {})
        rules = policy.rules
        if type(rules) is not type(own) or not set(rules.blocks) <= set(own.blocks):
            blocks = ", ".join(map(str, own.blocks))
            raise UserError(
                f"a policy under {type(rules).__name__} at blocks "
                f"{', '.join(map(str, rules.blocks))} does not play '{self.spec.name}': "
                f"it asks for {type(own).__name__} at blocks {blocks}"
            )
        policy.check_fit(self.backbone, self.spec.model)


def open_task(
    task: Task,
    *,
    weights: str | None = None,
    data: str | None = None,
    test_data: str | None = None,
    device: str = "cpu",
) -> OpenTask:
    """Load a task's model and images.

    Args:
        task: one of :data:`~tokenenv.suite.tasks.TASKS`.
        weights: a file of weights; None: those of the package, or timm's.
        data: a folder of training photographs, for tasks that have no images of their own.
        test_data: a folder of test photographs.
        device: where to put the model.

    Raises:
        UserError: photographs are missing, or given for a task with images of its own; test images
            are among the training images; model or images can't be loaded.
    """
    if task.embedded and (weights or data or test_data):
        raise UserError(
            f"task '{task.name}' brings model and images along: "
            "leave --weights, --data and --test-data out"
        )
    if not task.embedded and not (data and test_data):
        raise UserError(
            f"task '{task.name}' needs photographs: give --data DIR to learn from and "
            "--test-data DIR to test on, both laid out as class/image, and with --weights FILE "
            f"the weights of {task.model} where timm can't download them"
        )
    backbone = load_backbone(task.model, weights, device)
    train = open_source(data or task.data, backbone.model, split="train")
    test = open_source(test_data or task.data, backbone.model, split="test", limit=task.test_images)
    if data and test_data and _shared(Path(data), train, Path(test_data), test):
        raise UserError(
            f"the test images of '{test.name}' are among the training images: give other --data "
            "or --test-data"
        )
    return OpenTask(task, backbone, train, test)


def _shared(data: Path, train: ImageSource, test_data: Path, test: ImageSource) -> bool:
    """Whether an image file with the same name in both folders has the same content."""
    if not (data.is_dir() and test_data.is_dir()):
        return train.name == test.name  # a torchvision data set and its split
    for file in set(test.files) & set(train.files):
        with contextlib.suppress(OSError):  # unreadable ones are skipped later
            if filecmp.cmp(data / file, test_data / file, shallow=False):
                return True
    return False


def dense_predictions(opened: OpenTask) -> Tensor:
    """``(len(test),)`` class that the dense model predicts for each test image; -1: unreadable."""
    found = evaluation.dense_predictions(opened.backbone, opened.test, batch_size=_BATCH)
    opened.test.check_readable()
    return found


def dense_hits(opened: OpenTask, dense: Tensor) -> str:
    """Which readable test images the dense model classifies correctly, see :func:`hits`."""
    return hits((dense == opened.test.labels)[dense >= 0].numpy())


def read_points(
    opened: OpenTask,
    policies: dict[str, Method],
    dense: Tensor,
    progress: Callable[[int], object],
) -> list[Point]:
    """Measure policies on the test images.

    Args:
        opened: the task.
        policies: policies by the setting that tells them apart in the results.
        dense: from :func:`dense_predictions`.
        progress: called with the number of images done after each batch.
    """
    return [_read(opened, knob, policy, dense, progress) for knob, policy in policies.items()]


def sweep(
    opened: OpenTask, policy: Any, dense: Tensor, progress: Callable[[int], object]
) -> list[Point]:
    """Measure one policy on the test images at several thresholds.

    The thresholds are chosen by :func:`spread` on training images, never on test images.

    Args:
        opened: the task.
        policy: a policy with an adjustable threshold.
        dense: from :func:`dense_predictions`.
        progress: as for :func:`read_points`.
    """
    look_at = _looks(opened)

    def look(odds: float) -> tuple[float, float]:
        policy.threshold = _threshold(odds)
        return look_at(policy)

    points = []
    for odds in spread(look, opened.spec.low, opened.spec.high):
        policy.threshold = _threshold(odds)
        knob = f"threshold={policy.threshold:.6g}"
        points.append(_read(opened, knob, policy, dense, progress))
    return points


def chosen_values(opened: OpenTask, make: Callable[[float], Method]) -> list[float]:
    """Values of a fixed method's setting, chosen on training images as thresholds are.

    Args:
        opened: a task whose grid has the two ends between which values are chosen.
        make: the method with a value.
    """
    look_at = _looks(opened)
    low, high = opened.spec.low, opened.spec.high
    return spread(lambda value: look_at(make(value)), low, high, opened.spec.grid)


def _looks(opened: OpenTask) -> Callable[[Method], tuple[float, float]]:
    """A function that measures cost and top-1 of a method on some training images."""
    sample = opened.train.subset(_SAMPLE, seed=0)
    unknown = torch.zeros(len(sample), dtype=torch.long)  # what the dense model says of them

    def look_at(method: Method) -> tuple[float, float]:
        found = evaluation.evaluate(
            opened.backbone, method, sample, batch_size=_BATCH, dense=unknown
        )
        right = (found.reduced == found.labels).float().mean().item()
        return found.macs.mean().item() / found.dense_macs, right

    return look_at


def spread(
    look: Callable[[float], tuple[float, float]],
    low: float,
    high: float,
    ends: Sequence[float] = (-_WIDEST, _WIDEST),
) -> list[float]:
    """Log-odds of at most :data:`POINTS` thresholds that give a good front over ``[low, high]``.

    The front is a step function. Between two neighbouring thresholds it can miss at most the
    rectangle of their differences in cost and top-1. Repeatedly, the largest rectangle is split by
    the threshold halfway. One threshold that costs less than ``low`` is kept, too, as the start of
    the front.

    Args:
        look: maps a threshold's log-odds to its cost and top-1; the cost about monotone.
        low: lower end of the range.
        high: its upper end.
        ends: the widest log-odds, or the ends of another setting's values.
    """
    known = {odds: look(odds) for odds in ends}

    def kept() -> list[float]:
        below = [odds for odds, (cost, _) in known.items() if cost < low]
        inside = [odds for odds, (cost, _) in known.items() if low <= cost <= high]
        return sorted(inside + sorted(below, key=known.__getitem__)[-1:])

    while len(kept()) < POINTS and len(known) < _TRIES:
        missed, left, right = max(_rectangles(known, low, high), default=(0.0, 0.0, 0.0))
        if missed <= 0:
            break
        middle = (left + right) / 2
        known[middle] = look(middle)
    return kept() or [min(known, key=known.__getitem__)]


def _rectangles(
    known: dict[float, tuple[float, float]], low: float, high: float
) -> Iterable[tuple[float, float, float]]:
    """Areas of the rectangles that :func:`spread` splits, and the log-odds of their sides.

    Only neighbours in the range that are not too close. Half a point is added to the difference in
    top-1, so that plateaus are split, too.
    """
    for (left, one), (right, other) in itertools.pairwise(sorted(known.items())):
        if right - left > _CLOSEST:
            width = abs(min(max(one[0], low), high) - min(max(other[0], low), high))
            yield width * (abs(one[1] - other[1]) + 0.005), left, right


def _threshold(odds: float) -> float:
    return 1 / (1 + math.exp(-odds))


def _read(
    opened: OpenTask,
    knob: str,
    policy: Method,
    dense: Tensor,
    progress: Callable[[int], object],
) -> Point:
    found = evaluation.evaluate(
        opened.backbone, policy, opened.test, batch_size=_BATCH, dense=dense, progress=progress
    )
    right = (found.reduced == found.labels).numpy()
    return Point(
        knob,
        found.macs.mean().item() / found.dense_macs,
        right.mean().item(),
        hits(right),
        (found.reduced == found.dense).double().mean().item(),
    )
