"""What the environments of all interfaces share: a batch of episodes with checked actions."""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any, TypeVar, cast

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor

from tokenenv.envs import drawing
from tokenenv.envs.chosen import chosen_batch
from tokenenv.errors import UserError, check_choice
from tokenenv.game import Game
from tokenenv.game.build import build_game, check_arguments
from tokenenv.game.checks import MOST_IMAGES, check_whole
from tokenenv.game.rules import RULES, Observation

F = TypeVar("F", bound=Callable[..., Any])

RENDER_MODES = ["human", "rgb_array", "ansi"]


def _now(name: str) -> property:
    """A property that returns a copy of the current value, so that callers may write into it."""

    def get(play: Play) -> Tensor:
        play._check_started()
        return play._now[name].clone()

    return property(get)


def in_turn(method: F) -> F:
    """A method of an environment with a ``_play``, for one thread at a time; a decorator.

    Raises:
        UserError: another thread is in such a method of the same environment.
    """

    @functools.wraps(method)
    def alone(self: Any, *args: Any, **kwargs: Any) -> Any:
        busy = self._play.busy
        if not busy.acquire(blocking=False):
            raise UserError(
                "another thread is stepping this environment: give each thread one of its own"
            )
        try:
            return method(self, *args, **kwargs)
        finally:
            busy.release()

    return cast(F, alone)


class Play:
    """A game whose observations are one tensor and whose illegal actions are counted.

    All values are tensors on the game's device that autograd can use, copies for the caller.
    Only :meth:`draw`, and so ``human`` mode, synchronises with an accelerator.

    Args:
        game: ``B`` images, ``A`` agents each.
        render_mode: one of :data:`RENDER_MODES`, or None.

    Attributes:
        width: ``F + G``, the number of features that an agent observes.
        by_count: whether an image has one agent that chooses a count (``action="count"``). Then
            actions are ``(B,)`` and observations ``(B, F + G)``, else ``(B, A)`` and
            ``(B, A, F + G)``.
        active: ``(B, A)`` bool, which agents may act now. After the end all False, except with
            one agent per token (``token_prune``): there, which tokens are left.
        legal: ``(B, A, actions)`` bool, which actions are legal now. For an agent that may not
            act, only 0 is.
        tokens_left: ``(B,)`` int64 visual tokens now.
        state: ``(B, S)`` float32 global state; after the end, that of the last decision.
        illegal: ``(B, A)`` int64, how many illegal actions each agent chose in this episode.
        busy: held by the thread that is stepping, see :func:`in_turn`.
        correct, dense_correct: ``(B,)`` bool, whether the reduced and the dense model predict the
            true class; False before the end.

    Raises:
        UserError: unknown render mode; on reading an attribute before the first :meth:`reset`.
    """

    def __init__(self, game: Game, render_mode: str | None) -> None:
        check_choice("render_mode", render_mode, (None, *RENDER_MODES))
        self.game = game
        self.render_mode = render_mode
        self.width = game.agent_dim + game.shared_dim
        self.by_count = game.rules.by_count
        self._now: dict[str, Tensor] = {}
        self._seeded = False
        self._sources: list[Tensor] = []
        self._screen = drawing.Screen()
        self.busy = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        """All but the lock, which belongs to this object's threads, and the window."""
        return {k: v for k, v in vars(self).items() if k not in ("busy", "_screen")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`__getstate__` gave, with a lock of its own."""
        vars(self).update(state)
        self.busy, self._screen = threading.RLock(), drawing.Screen()

    def clone(self, game: Game) -> Play:
        """The same with a clone of its game; each of the two goes on by itself."""
        twin = copy(self)
        twin.game, twin._now, twin._sources = game, dict(self._now), list(self._sources)
        return twin

    @property
    def action_space(self) -> spaces.Discrete | spaces.MultiDiscrete:
        """The action space of one image: a count, or 0 or 1 for each agent."""
        if self.by_count:
            return spaces.Discrete(self.game.actions)
        return spaces.MultiDiscrete([2] * self.game.agents)

    @property
    def observation_space(self) -> spaces.Box:
        """The observation space of one image: ``(F + G,)``, or ``(A, F + G)``."""
        shape = (self.width,) if self.by_count else (self.game.agents, self.width)
        return spaces.Box(-np.inf, np.inf, shape, np.float32)

    @property
    def needs_seed(self) -> bool:
        """Whether the order of the images has not been seeded yet."""
        return not self._seeded

    active = _now("active")
    legal = _now("legal")
    state = _now("state")
    illegal = _now("illegal")
    correct = _now("correct")
    dense_correct = _now("dense_correct")

    @property
    def tokens_left(self) -> Tensor:
        """``(B,)`` int64 visual tokens now."""
        self._check_started()
        return self.game.counts[-1].clone()

    def seed(self, seed: int) -> None:
        """Seed the order of the images.

        Raises:
            UserError: the seed is negative, or no whole number.
        """
        try:
            operator.index(seed)
        except TypeError:
            raise UserError(f"seed={seed!r:.60} is no whole number: give one from 0") from None
        if seed < 0:
            raise UserError(f"seed {seed} is negative: give 0 or more")
        self.game.seed(seed)
        self._seeded = True

    def reset(self, options: dict[str, Any] | None = None) -> Tensor:
        """Start the next episodes; returns float32 observations, see :attr:`by_count`.

        Args:
            options: which images to play, see :func:`~tokenenv.envs.chosen.chosen_batch`.

        Raises:
            UserError: they name no image.
        """
        seen = self.game.reset(chosen_batch(self.game.stream, options, self.game.repeats))
        wrong = torch.zeros_like(seen.active[:, 0])
        illegal = torch.zeros_like(seen.active, dtype=torch.int64)
        nothing = torch.zeros_like(wrong, dtype=torch.float32)
        self._now = {
            "illegal": illegal,
            "correct": wrong,
            "dense_correct": wrong,
            "return": nothing,
        }
        self._sources = []
        observation = self._take(seen)
        self._show()
        return observation

    def step(self, action: Any) -> tuple[Tensor, Tensor, bool]:
        """Play one decision.

        Args:
            action: array or tensor of integers, see :attr:`by_count`. An illegal one is replaced
                by 0.

        Returns:
            The next observations, zeros at the end; ``(B, A)`` float32 rewards, or ``(B, 1)``
            if all agents of an image share it; whether the episodes have ended.

        Raises:
            UserError: wrong shape or value, or no episode is running.
        """
        self._check_started()
        assert self.game.episode is not None
        if self.game.episode.done:
            raise UserError("the episode is over: call reset() first")
        chosen = self._checked(action)
        inside = (chosen >= 0) & (chosen < self.game.actions)
        wanted = torch.where(inside, chosen, 0)
        now = self._now
        allowed = inside & now["legal"].gather(2, wanted[..., None])[..., 0]
        now["illegal"] = now["illegal"] + ~allowed
        transition = self.game.step(torch.where(allowed, wanted, 0))
        if self.render_mode is not None:
            self._sources.append(self.game.episode.tokens.owners)
        reward = transition.reward.clone()
        now["return"] = now["return"] + reward.sum(1)
        over = transition.observation is None
        if transition.observation is not None:
            observation = self._take(transition.observation)
        else:
            assert transition.outcome is not None
            left = torch.zeros_like(now["active"])
            now["active"] = self.game.history[-1] if self.game.rules.token_agents else left
            now["legal"] = self._legal(None)
            now["correct"] = transition.outcome.correct.bool()
            now["dense_correct"] = transition.outcome.dense.argmax(1) == self.game.labels
            observation = reward.new_zeros(len(reward), *self.observation_space.shape)
        self._show()
        return observation, reward, over

    def draw(self, row: int = 0) -> NDArray[np.uint8] | str | None:
        """Image ``row`` and its tokens after each decision, as the render mode says.

        Raises:
            UserError: there is no render mode, or no episode was started.
        """
        if self.render_mode is None:
            raise UserError(
                f"render_mode is None: choose from {', '.join(RENDER_MODES)} at creation"
            )
        self._check_started()
        total = self._now["return"]
        if self.render_mode == "human":
            self._screen.show(self.game, self._sources, total, row)
            return None
        if self.render_mode == "rgb_array":
            return drawing.frame(self.game, self._sources, total, row)
        return drawing.words(self.game, self._sources, row)

    def _take(self, seen: Observation) -> Tensor:
        assert seen.state is not None
        self._now |= {"active": seen.active, "state": seen.state.float()}
        self._now["legal"] = self._legal(seen.legal)
        if self.by_count:
            # Shown to inactive agents too: a value function needs to know the decision's number.
            return torch.cat([seen.agents[:, 0], seen.shared], dim=-1).float()
        shared = seen.shared[:, None] * seen.active[..., None]
        return torch.cat([seen.agents, shared], dim=-1).float()

    def _legal(self, legal: Tensor | None) -> Tensor:
        """``legal``; if the rules give none, all actions of active agents, and 0 of the others."""
        if legal is None:
            more = self._now["active"][..., None].expand(-1, -1, self.game.actions - 1)
            return torch.cat([torch.ones_like(more[..., :1]), more], dim=2)
        return legal

    def _checked(self, action: Any) -> Tensor:
        """``(B, A)`` int64 actions on the game's device."""
        active = self._now["active"]
        batch, count = active.shape
        shape = (batch,) if self.by_count else (batch, count)
        given = _as_numbers(action)
        if given.shape != shape:
            raise UserError(f"action has shape {tuple(given.shape)}: give one of shape {shape}")
        chosen = given.to(torch.int64)
        # Values are checked on a CPU only: reading them would synchronise with an accelerator.
        if given.device.type == "cpu":
            wrong = (chosen != given) | (chosen < 0) | (chosen >= self.game.actions)
            if wrong.any():
                raise UserError(f"action {given[wrong][0].item()} is {self._no_action()}")
        return chosen.to(active.device).reshape(batch, count)

    def _no_action(self) -> str:
        if self.by_count:
            return f"out of range: choose 0 to {self.game.actions - 1}"
        no, yes = self.game.rules.choices
        return f"neither 0 ({no}) nor 1 ({yes})"

    def _check_started(self) -> None:
        if self.game.episode is None:
            raise UserError(
                "no episode was started: call reset() first (a copy of an environment has none)"
            )

    def _show(self) -> None:
        if self.render_mode == "human":
            for row in range(self.game.batch_size):
                self.draw(row)


def open_play(
    rules: str,
    render_mode: str | None,
    game: dict[str, Any],
    num_envs: int = 1,
    also: Sequence[str] = ("render_mode",),
) -> Play:
    """The game of an environment, which fixes ``rules`` and ``batch_size`` itself.

    Args:
        rules: name of the rules. Those with one agent per block use ``action="count"`` unless
            ``game`` has another ``action``: every learner can handle a Discrete space.
        render_mode: one of :data:`RENDER_MODES`, or None.
        game: the other arguments of :func:`~tokenenv.game.build.build_game`.
        num_envs: images per episode.
        also: what the environment takes besides.

    Raises:
        UserError: a value is unknown or contradicts another one.
    """
    count = check_whole("num_envs", num_envs, 1, MOST_IMAGES + 1)
    fixed = ("rules", "batch_size")
    check_arguments(rules, (name for name in game if name not in fixed), also, fixed)
    for name in fixed:
        if name in game:
            raise UserError(
                f"{name}={game[name]!r}: this environment has its own; leave it out, "
                "or give it to tokenenv.build_game"
            )
    game = RULES[rules].face_defaults | game
    return Play(build_game(rules=rules, batch_size=count, **game), render_mode)


def check_by_agent(actions: Any) -> None:
    """Raise :class:`UserError` unless ``actions`` are a dict, as PettingZoo's are."""
    if not isinstance(actions, Mapping):
        raise UserError(
            f"actions={actions!r:.60}: give a dict with the action of each agent in env.agents"
        )


def one_image(action: Any) -> Tensor:
    """The action of a single image with a batch dimension of 1 added.

    Raises:
        UserError: it is not an array of numbers.
    """
    return _as_numbers(action)[None]


def _as_numbers(action: Any) -> Tensor:
    """Actions in any array-like form as a tensor that can be compared with integers."""
    if isinstance(action, Tensor):
        if not action.is_complex():
            return action
    else:
        try:
            given = np.asarray(action)
        except (TypeError, ValueError):  # rows of different lengths, tensors of another device
            given = np.asarray(None)
        if given.dtype.kind in "biuf":
            # torch can't compare unsigned integers wider than a byte with other types.
            return torch.as_tensor(given.astype(np.int64) if given.dtype.kind == "u" else given)
    raise UserError(f"action of {type(action).__name__} does not hold whole numbers only")


def one_choice(action: Any, choices: int) -> int | None:
    """One agent's action, any kind of number, as an int; None unless it is in 0..choices - 1."""
    try:
        given = _as_numbers(action)
    except UserError:
        return None
    value = given.item() if given.shape == () else -1
    return int(value) if 0 <= value < choices and value == int(value) else None


def check_time_limit(limit: int | None, decisions: int) -> None:
    """Raise :class:`UserError` where ``limit`` steps would end an episode before its last decision.

    The image would not be classified, and a reward at the end never be paid. -1 is no limit.
    """
    if limit is not None and limit != -1 and limit < decisions:
        raise UserError(
            f"max_episode_steps={limit} is less than the episode's {decisions} decisions: give "
            f"max_cycles={limit} instead"
        )
