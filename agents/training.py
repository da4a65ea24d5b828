"""The loop around a learner: evaluate, keep the best, checkpoint, resume, stop on Ctrl-C."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from tqdm import tqdm

from agents.policy import ActorPolicy
from agents.storage import flatten_state, read_tensors, unflatten_state, write_tensors
from tokenenv.errors import UserError

CHECKPOINT = "checkpoint.safetensors"


class Learner(Protocol):
    """Improves a policy, one update at a time."""

    policy: ActorPolicy

    def update(self) -> dict[str, float]:
        """One update; returns numbers to log."""

    def state_dict(self) -> dict[str, Any]:
        """Everything but the game's own state."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""


class Resumable(Protocol):
    """The part of a game that must be remembered: the order of its images."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""


@dataclass(frozen=True)
class Judgement:
    """A deterministic policy on images it does not train on.

    Attributes:
        drop: top-1 lost against the dense model, percentage points.
        saving: multiply-adds saved, percent, policy included.
    """

    drop: float
    saving: float

    def beats(self, other: Judgement | None, target_drop: float) -> bool:
        """DORA's rule: the largest saving within the target, else the smallest drop."""
        if other is None:
            return True
        mine, theirs = max(self.drop, target_drop), max(other.drop, target_drop)
        return (mine, -self.saving) < (theirs, -other.saving)


class Trainer:
    """Runs a learner for a number of updates.

    Args:
        learner: improves its policy.
        order: the order of the game's images, for exact resumption.
        judge: measures the deterministic policy on held-back images.
        out: run folder; the checkpoint is written there.
        updates: how many updates in all.
        evaluate_every: updates between two judgements; a checkpoint follows each.
        target_drop: percentage points that may be lost; decides which policy is best.
        config: what the run is; resuming with another is an error.
        log: called with the update's number and its numbers.
    """

    def __init__(
        self,
        learner: Learner,
        order: Resumable,
        judge: Callable[[ActorPolicy], Judgement],
        out: Path,
        *,
        updates: int,
        evaluate_every: int,
        target_drop: float,
        config: dict[str, Any],
        log: Callable[[int, dict[str, float]], None],
    ) -> None:
        self.learner, self.order, self.judge, self.out = learner, order, judge, out
        self.updates, self.evaluate_every, self.target_drop = updates, evaluate_every, target_drop
        self.config, self.log = config, log
        self.done = 0
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []
        self.best: Judgement | None = None
        self.best_state: dict[str, Tensor] = {}
        self.stopped = False

    def run(self) -> None:
        """Train to the end, or to Ctrl-C: then the update in progress is finished and kept."""
        if self.done == 0:
            self._evaluate()
        last = time.perf_counter()
        with (
            _interruptible() as interrupted,
            tqdm(total=self.updates, initial=self.done, unit="update", smoothing=0.05) as bar,
        ):
            while self.done < self.updates and not interrupted():
                numbers = self.learner.update()
                self.done += 1
                bar.update()
                bar.set_postfix(self._summary(numbers), refresh=False)
                self.history.append({"update": self.done, **numbers})
                self.log(self.done, numbers)
                if self.done % self.evaluate_every == 0 or self.done == self.updates:
                    self._evaluate()
                    now = time.perf_counter()
                    self.seconds, last = self.seconds + now - last, now
                    self.save()
            if interrupted():
                self.stopped = True
                self.seconds += time.perf_counter() - last
                self.save()

    def _evaluate(self) -> None:
        found = self.judge(self.learner.policy)
        if found.beats(self.best, self.target_drop):
            self.best = found
            state = self.learner.policy.state_dict()
            self.best_state = {name: t.detach().clone() for name, t in state.items()}
        row = {"update": self.done, **asdict(found)}
        self.history.append(row)
        self.log(self.done, {f"held_back/{k}": v for k, v in asdict(found).items()})

    def _summary(self, numbers: dict[str, float]) -> dict[str, str]:
        assert self.best is not None
        return {
            "reward": f"{numbers['reward']:.3f}",
            "keep": f"{numbers['keep']:.2f}",
            "best": f"-{self.best.saving:.0f}% MACs at {self.best.drop:+.1f}pp lost",
        }

    def save(self) -> None:
        """Write the checkpoint, atomically."""
        tensors: dict[str, Tensor] = {}
        state = {
            "learner": self.learner.state_dict(),
            "order": self.order.state_dict(),
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
        """Go on from the checkpoint in the run folder.

        Raises:
            UserError: no checkpoint, or one of a run with another configuration.
        """
        path = self.out / CHECKPOINT
        if not path.is_file():
            raise UserError(f"nothing to resume in '{self.out}': no {CHECKPOINT} there")
        tensors, saved = read_tensors(path)
        check_same(saved.get("config", {}), self.config, self.out)
        state = unflatten_state(saved["state"], tensors)
        self.learner.load_state_dict(state["learner"])
        self.order.load_state_dict(state["order"])
        self.best_state = state["best_state"]
        self.done, self.seconds = saved["done"], saved["seconds"]
        self.history = saved["history"]
        self.best = Judgement(**saved["best"]) if saved["best"] else None


def check_same(saved: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    """Raise :class:`UserError` naming the first setting that differs."""
    for key in sorted(saved.keys() | now.keys()):
        if saved.get(key) != now.get(key):
            raise UserError(
                f"cannot resume '{out}' with {key}={now.get(key)}: it was started with "
                f"{key}={saved.get(key)}; use the same settings or another --out"
            )


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag; a second one interrupts at once."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag.is_set
        return

    def on_interrupt(number: int, frame: object) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()
        tqdm.write("stopping after this update; press Ctrl-C again to stop at once")

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield flag.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def calibrate(
    policy: ActorPolicy, judge: Callable[[ActorPolicy], Judgement], target_drop: float, steps: int
) -> Judgement:
    """Set the policy's threshold to the highest saving within the target drop, by bisection.

    The drop grows with the threshold up to noise; the logit of the threshold is halved
    ``steps`` times between 0.02 and 0.98.

    Returns:
        The judgement at the threshold that was set.
    """
    low, high = -4.0, 4.0
    best: tuple[Judgement, float] | None = None
    for _ in range(steps):
        middle = (low + high) / 2
        policy.threshold = 1 / (1 + math.exp(-middle))
        found = judge(policy)
        if best is None or found.beats(best[0], target_drop):
            best = found, policy.threshold
        if found.drop <= target_drop:
            low = middle
        else:
            high = middle
    assert best is not None
    judgement, policy.threshold = best
    return judgement
