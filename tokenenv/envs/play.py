"""The part that all faces of the game share: a batch of episodes as the outside sees them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenenv import render
from tokenenv.errors import UserError
from tokenenv.game import Game
from tokenenv.rules import Observation

RENDER_MODES = ["human", "rgb_array", "ansi"]


class Play:
    """A game with its observations joined to one array and its illegal actions counted.

    Everything is a tensor on the game's device that autograd can use; nothing makes an
    accelerator wait.

    Args:
        game: ``B`` images, ``P`` agents each.
        render_mode: one of :data:`RENDER_MODES`, or None.

    Attributes:
        width: ``F + G``, how many numbers an agent observes.
        active: ``(B, P)`` bool, who may act now; after the end, who was left.
        state: ``(B, S)`` float32 global state; after the end, that of the last decision.
        illegal: ``(B, P)`` int64, how often in this episode a pruned agent chose to be kept.
        correct, dense_correct: ``(B,)`` bool, whether the reduced and the dense model name the
            true class; False until the end.

    Raises:
        UserError: unknown render mode.
    """

    def __init__(self, game: Game, render_mode: str | None) -> None:
        check_choice("render_mode", render_mode, (None, *RENDER_MODES))
        self.game = game
        self.render_mode = render_mode
        self.width = game.agent_dim + game.shared_dim
        self.active: Tensor
        self.state: Tensor
        self.illegal: Tensor
        self.correct: Tensor
        self.dense_correct: Tensor
        self._seeded = False

    @property
    def needs_seed(self) -> bool:
        """Whether no order of images was drawn yet."""
        return not self._seeded

    def seed(self, seed: int) -> None:
        """Draw the order of images. A negative seed raises :class:`UserError`."""
        if seed < 0:
            raise UserError(f"seed {seed} is negative: give 0 or more")
        self.game.seed(seed)
        self._seeded = True

    def reset(self) -> Tensor:
        """Start the next episodes; returns ``(B, P, F + G)`` float32 observations."""
        seen = self.game.reset()
        self.illegal = torch.zeros_like(seen.active, dtype=torch.int64)
        self.correct = torch.zeros_like(seen.active[:, 0])
        self.dense_correct = self.correct
        observation = self._take(seen)
        self._show()
        return observation

    def step(self, action: Any) -> tuple[Tensor, Tensor, bool]:
        """Play one decision.

        Args:
            action: ``(B, P)`` array or tensor, 1 keep, 0 prune. Pruned agents stay pruned.

        Returns:
            The next observations, zeros at the end; ``(B, P)`` float32 rewards; whether the
            episodes have ended.

        Raises:
            UserError: wrong shape or value, or no episode was started.
        """
        self._check_started()
        chosen = self._checked(action)
        self.illegal = self.illegal + ((chosen != 0) & ~self.active)
        transition = self.game.step(chosen)
        reward = transition.reward.clone()
        over = transition.observation is None
        if transition.observation is not None:
            observation = self._take(transition.observation)
        else:
            assert transition.outcome is not None
            self.active = self.game.history[-1].clone()
            self.correct = transition.outcome.correct.bool()
            self.dense_correct = transition.outcome.native.argmax(1) == self.game.labels
            observation = reward.new_zeros(*reward.shape, self.width)
        self._show()
        return observation, reward, over

    def draw(self, row: int = 0) -> NDArray[np.uint8] | str | None:
        """Image ``row`` and its pruned tokens: a picture, a text, or the text printed.

        Raises:
            UserError: there is no render mode, or no episode was started.
        """
        if self.render_mode is None:
            raise UserError(
                f"render_mode is None: choose from {', '.join(RENDER_MODES)} at creation"
            )
        self._check_started()
        game = self.game
        alive = np.zeros((0, game.agents), dtype=bool)
        if game.history:
            alive = torch.stack([after[row] for after in game.history]).cpu().numpy()
        image = render.to_pixels(game.images[row], game.backbone.model)
        show = render.token_picture if self.render_mode == "rgb_array" else render.token_text
        frame = show(image, alive, game.backbone.grid, game.rules.blocks)
        if self.render_mode == "human":
            print(frame)
            return None
        return frame

    def _take(self, seen: Observation) -> Tensor:
        assert seen.state is not None
        self.active, self.state = seen.active.clone(), seen.state.float().clone()
        shared = seen.shared[:, None] * seen.active[..., None]
        return torch.cat([seen.agents, shared], dim=-1).float()

    def _checked(self, action: Any) -> Tensor:
        shape = (self.game.batch_size, self.game.agents)
        chosen = torch.as_tensor(action)
        if chosen.shape != shape:
            raise UserError(f"action has shape {tuple(chosen.shape)}: give one of shape {shape}")
        # Elsewhere than on a CPU a look at the values would make the accelerator wait.
        if chosen.device.type == "cpu" and not ((chosen == 0) | (chosen == 1)).all():
            wrong = chosen[(chosen != 0) & (chosen != 1)][0].item()
            raise UserError(f"action {wrong} is neither 0 (prune) nor 1 (keep)")
        return chosen.to(self.active.device, torch.int64)

    def _check_started(self) -> None:
        if self.game.episode is None:
            raise UserError("no episode was started: call reset() first")

    def _show(self) -> None:
        if self.render_mode == "human":
            for row in range(self.game.batch_size):
                self.draw(row)


def action_masks(active: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """``(P, 2)`` which of prune and keep each agent may do: a pruned one stays pruned."""
    return np.stack([np.ones_like(active), active], axis=1)


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise :class:`UserError` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise UserError(f"{name}={value!r}: choose from {', '.join(map(repr, choices))}")
