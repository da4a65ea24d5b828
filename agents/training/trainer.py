"""The training loop: update, evaluate, keep the best policy, checkpoint, resume, stop."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, get_type_hints

from torch import Tensor, nn
from tqdm import tqdm

from agents.systems.settings import word
from agents.training.judgement import Judge, Judgement
from agents.workers import ALONE, Workers
from tokenenv.artefact import FAULTS, Unfit, Within, check_fields, fits, reason_of
from tokenenv.errors import UserError
from tokenenv.storage import (
    check_values,
    flatten_state,
    read_tensors,
    unflatten_state,
    write_tensors,
)

CHECKPOINT = "checkpoint.safetensors"
_SAVED = {
    "config": dict,
    "done": Within(0, 2**53),
    "seconds": Within(0.0, 1e12),
    "history": list[dict],
    "best": dict,
    "state": dict,
}
"""What a checkpoint says beside its tensors."""

_JUDGED = get_type_hints(Judgement)

_STOPS = (signal.SIGINT, signal.SIGTERM)

Log = Callable[[int, dict[str, float]], object]
"""A function that is called with the number of updates done and numbers by name."""

AfterUpdate = Callable[[int, Any], object]
"""A function that is called with the number of updates done and the policy as it is then."""


class Learner(Protocol):
    """Improves a policy, one update at a time."""

    @property
    def policy(self) -> nn.Module:
        """The module that is judged and whose best state is kept."""

    def update(self) -> dict[str, float]:
        """Do one update; returns numbers to log, among them ``keep`` and the number to show."""

    def state_dict(self) -> dict[str, Any]:
        """The state of policy, optimisers and generators, without that of the game."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""


class Resumable(Protocol):
    """The state of a game that a checkpoint holds: the order of its images."""

    def state_dict(self) -> dict[str, Any]:
        """The state, as tensors and numbers."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""


class Trainer:
    """Runs a learner for a number of updates.

    Args:
        learner: improves its policy. No episode may be in progress between two updates, because
            a checkpoint holds only the order of the images.
        order: the order of the game's images, so that a resumed run is exact.
        judge: measures the deterministic policy on held-back images.
        out: run folder; the checkpoint is written there.
        updates: number of updates in all.
        evaluate_every: updates between two judgements; a checkpoint is written after each.
        target_saving, target_drop: decide which policy is best, see
            :meth:`~agents.training.judgement.Judgement.beats`.
        config: the description of the run; resuming with a different one is an error.
        shown: name of the learner's number that the progress table shows.
        most_seconds: time after which no further update is started, that before resuming included.
        after_update: called in the first process before the first update and after each; it must
            not change the policy.
        workers: the processes that train together, each with a trainer. All of them judge, keep
            the best policy, and stop after the same update; the first prints and writes files.

    Attributes:
        done: number of updates so far.
        seconds: time spent in :meth:`run`, including that of the run before it was resumed.
        history: one row per update and one per judgement.
        best, best_state: the best judgement, and the state of the policy that was judged.
        stopped: whether Ctrl-C or SIGTERM ended :meth:`run` early.
    """

    def __init__(
        self,
        learner: Learner,
        order: Resumable,
        judge: Judge,
        out: Path,
        *,
        updates: int,
        evaluate_every: int,
        target_saving: float,
        config: dict[str, Any],
        target_drop: float = 0.0,
        shown: str = "reward",
        saved: str = "MACs",
        most_seconds: float = math.inf,
        after_update: AfterUpdate | None = None,
        workers: Workers = ALONE,
    ) -> None:
        self.learner, self.order, self.judge, self.out = learner, order, judge, out
        self.updates, self.evaluate_every = updates, evaluate_every
        self.target_saving, self.target_drop = target_saving, target_drop
        self.config, self.shown, self.workers = config, shown, workers
        self._saved, self.most_seconds = saved, most_seconds
        self._after_update = None if workers.rank else after_update
        self.done = 0
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []
        self.best: Judgement | None = None
        self.best_state: dict[str, Tensor] = {}
        self.stopped = False

    def run(self, log: Log = lambda update, numbers: None) -> None:
        """Train to the last update; Ctrl-C or SIGTERM stops after the current one."""
        clock = _Clock(self.seconds, self.done)
        bar = tqdm(total=self.updates, initial=self.done, unit="update", disable=None, leave=False)
        with interruptible(say=not self.workers.rank) as interrupted, bar:
            if self.done < self.updates:
                tqdm.write(f" update {self.shown:>8} kept  {self._saved} saved  top-1 lost")
            if not self.history:
                self._look()
                self._evaluate(log, clock)
            late = False
            while self.done < self.updates and not self.workers.agree(interrupted()):
                late = self.workers.agree(clock.seconds() >= self.most_seconds)
                if late:
                    break
                numbers = self.learner.update()
                self.done += 1
                self.history.append({"update": self.done, **numbers})
                log(self.done, numbers)
                self._look()
                bar.update()
                if self.done % self.evaluate_every == 0 or self.done == self.updates:
                    self._evaluate(log, clock)
            if late and "saving" not in self.history[-1]:
                self._evaluate(log, clock)
            elif self.done < self.updates and not late:
                self.stopped = True
                self._save(clock)

    def _look(self) -> None:
        if self._after_update is not None:
            self._after_update(self.done, self.learner.policy)

    def _evaluate(self, log: Log, clock: _Clock) -> None:
        """Judge the policy, keep it if it is the best so far, print a line, save a checkpoint.

        Raises:
            UserError: a weight is not finite.
        """
        for name, tensor in self.learner.policy.state_dict().items():
            if not tensor.isfinite().all():  # the same in every process
                raise self.workers.mistake(
                    f"training diverged ('{name}' is not finite after {self.done} updates): "
                    "use a smaller learning rate"
                )
        found = self.judge(self.learner.policy)
        better = found.beats(self.best, self.target_saving, self.target_drop)
        if better:
            self.best = found
            state = self.learner.policy.state_dict()
            self.best_state = {name: t.detach().clone() for name, t in state.items()}
        rollout = f"{'':14}"
        if self.done:
            rollout = f"{self.history[-1][self.shown]:8.3f}{100 * self.history[-1]['keep']:5.0f}%"
        tqdm.write(
            f"{self.done:7d} {rollout}{found.saving:11.1f}%{found.drop:+10.2f} pp"
            f"{'  best' if better else '':6}  {clock.left(self.done, self.updates)}".rstrip()
        )
        self.history.append({"update": self.done, **found.numbers()})
        log(self.done, {f"held_back/{k}": v for k, v in found.numbers().items()})
        self._save(clock)

    def _save(self, clock: _Clock) -> None:
        """Write the checkpoint, in the first process, atomically."""
        self.seconds = clock.seconds()
        orders = self.workers.gather(self.order.state_dict())
        if self.workers.rank:
            return
        tensors: dict[str, Tensor] = {}
        state = {
            "learner": self.learner.state_dict(),
            "orders": orders,
            "best_state": self.best_state,
        }
        skeleton = flatten_state("state", state, tensors)
        write_tensors(
            self.out / CHECKPOINT,
            tensors,
            {
                "config": self.config,
                "done": self.done,
                "seconds": self.seconds,
                "history": self.history,
                "best": asdict(self.best) if self.best else None,
                "state": skeleton,
            },
        )

    def resume(self) -> None:
        """Continue from the checkpoint in the run folder.

        Raises:
            UserError: there is no checkpoint, it is unreadable, of a run with another description,
                or holds values that are not finite.
        """
        path = self.out / CHECKPOINT
        if not path.is_file():
            raise UserError(
                f"nothing to resume in '{self.out}', no {CHECKPOINT} there: leave --resume out to "
                "start a run"
            )
        tensors, saved = read_tensors(path)
        try:
            check_fields(saved, _SAVED)
            check_fields(saved["best"], _JUDGED, closed=True)
            state = unflatten_state(saved["state"], tensors)
            check_same(saved["config"], self.config, self.out)
            self._check_values(tensors, path)
            self.learner.load_state_dict(state["learner"])
            # With as many processes as before each restores its own order: orders differ where a
            # process skipped unreadable images. With another number all take the first one's.
            orders, rank = state["orders"], self.workers.rank
            self.order.load_state_dict(orders[rank if len(orders) == self.workers.count else 0])
            _check_best(state["best_state"], self.learner.policy.state_dict())
            _check_history(saved["history"], saved["done"], self.shown)
            self.best_state = state["best_state"]
            self.done, self.seconds = saved["done"], saved["seconds"]
            self.history = saved["history"]
            self.best = Judgement(**saved["best"])
        except UserError:
            raise
        except FAULTS as error:
            raise UserError(
                f"'{path}' is not a checkpoint of this version ({reason_of(error)}): start with "
                "another --out"
            ) from None

    def _check_values(self, tensors: dict[str, Tensor], path: Path) -> None:
        """Refuse a checkpoint with values that no training goes on from."""
        policy = self.learner.policy.state_dict()
        own: dict[str, Tensor] = {}
        now = {"learner": self.learner.state_dict(), "best_state": policy}
        flatten_state("state", now, own)
        check_values(tensors, own, f"'{path}'", "start with another --out")


def _check_best(best: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Raise Unfit unless the tensors are those of the policy's state."""
    if {name: tensor.shape for name, tensor in best.items()} != {
        name: tensor.shape for name, tensor in own.items()
    }:
        raise Unfit("the best policy's tensors are not of this policy's shapes")


def _check_history(history: list[dict[str, Any]], done: int, shown: str) -> None:
    """Raise Unfit unless the rows are those of a training after ``done`` updates."""
    updated = dict.fromkeys((shown, "keep"), float)
    for row in history:
        if not fits(row, dict[str, float]):
            raise Unfit(f"a row of 'history' is {row!r:.40}")
        check_fields(row, {"update": Within(0, done)})
        if "saving" in row:
            check_fields(row, _JUDGED)
        else:
            check_fields(row, updated)
    if not history or history[-1]["update"] != done:
        raise Unfit(f"'history' does not end with update {done}")
    if done and not any(row["update"] == done and "keep" in row for row in history):
        raise Unfit(f"'history' lacks update {done}")


def check_same(saved: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    """Raise :class:`UserError` naming the first setting that differs.

    A number equals a list of that one number: some settings once took a single number only.
    """
    for key in sorted(saved.keys() | now.keys()):
        before, after = saved.get(key), now.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            check_same(before, after, out)
            continue
        if not (before == after or [before] == after or before == [after]):
            raise UserError(
                f"cannot resume '{out}' with {key}={word(after)}: it was started with "
                f"{key}={word(before)}; use the same settings or another --out"
            )


class _Clock:
    """Time spent on a run, including before it was resumed, and an estimate of the rest."""

    def __init__(self, seconds: float, done: int) -> None:
        self._earlier, self._first, self._start = seconds, done, time.perf_counter()

    def seconds(self) -> float:
        """Seconds spent on the run, including before it was resumed."""
        return self._earlier + time.perf_counter() - self._start

    def left(self, done: int, updates: int) -> str:
        """Estimate as ``"1:05 left"``; empty before the first update and after the last."""
        if done in (self._first, updates):
            return ""
        elapsed = time.perf_counter() - self._start
        remaining = elapsed / (done - self._first) * (updates - done)
        return f"{tqdm.format_interval(remaining)} left"


@contextmanager
def interruptible(say: bool = True) -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a flag; a second one interrupts at once.

    Args:
        say: whether to print that the run will stop.

    Yields:
        A function that returns whether a signal has come.
    """
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag.is_set
        return

    def on_signal(number: int, frame: object) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()
        # The signal may have interrupted print(), which must not be entered twice.
        if say:
            os.write(2, b"\nstopping after this update; press Ctrl-C again to stop at once\n")

    before = {number: signal.signal(number, on_signal) for number in _STOPS}
    try:
        yield flag.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
