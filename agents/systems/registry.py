"""The systems that can be trained, by the words a user types."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from agents.systems.settings import Settings

if TYPE_CHECKING:
    from agents.training.judgement import Judgement
    from agents.workers import Workers
    from tokenenv.data import ImageSource
    from tokenenv.game import Game
    from tokenenv.vit.backbone import Backbone


class Config(Settings, Protocol):
    """Settings of a system, and what is built from them."""

    batch: int
    repeats: int
    updates: int
    evaluate_every: int
    held_back: float
    calibrate: int
    target_saving: float

    @property
    def target_drop(self) -> float:
        """Share of the images that top-1 may lose; 0 where the saving is the target."""

    @property
    def first_price(self) -> float:
        """What steers the balance of cost and damage in the reward, before training."""

    def next_price(self, price: float, found: Judgement) -> float:
        """The same after a policy was judged."""

    def set_price(self, game: Game, price: float) -> None:
        """Tell the game's reward."""

    def game(self, backbone: Backbone, source: ImageSource) -> Game:
        """The game to learn from."""

    def policy(self, game: Game, model: str) -> Any:
        """An untrained policy for it."""

    def learner(self, policy: Any, game: Game, seed: int, workers: Workers) -> Any:
        """What trains it, with other processes."""


def _rl4evit() -> Any:
    from agents.systems.rl4evit import RL4EViTConfig

    return RL4EViTConfig


def _dora() -> Any:
    from agents.systems.dora import DoraConfig

    return DoraConfig


def _dora_prune() -> Any:
    from agents.systems.dora import DoraPruneConfig

    return DoraPruneConfig


def _mstm() -> Any:
    from agents.finetune.config import MSTMConfig

    return MSTMConfig


def _evit() -> Any:
    from agents.finetune.config import EViTConfig

    return EViTConfig


def _rl4evit_finetune() -> Any:
    from agents.finetune.config import RL4EViTFineTuneConfig

    return RL4EViTFineTuneConfig


def _dynamicvit() -> Any:
    from agents.finetune.config import DynamicViTConfig

    return DynamicViTConfig


def _ltm() -> Any:
    from agents.finetune.ltm import LTMConfig

    return LTMConfig


FINE_TUNED: dict[str, Callable[[], Any]] = {
    "mstm": _mstm,
    "evit": _evit,
    "rl4evit-finetune": _rl4evit_finetune,
    "dynamicvit": _dynamicvit,
    "ltm": _ltm,
}
"""Those that train the backbone: as :data:`SYSTEMS`, of :class:`agents.finetune.config`'s."""

SYSTEMS: dict[str, Callable[[], Any]] = {
    "rl4evit": _rl4evit,
    "dora": _dora,
    "dora-prune": _dora_prune,
}
"""Those that train a policy: each gives the class of its settings.

Nothing heavy is imported before.
"""

SUMMARIES = {
    "rl4evit": "an agent per token, keep or prune before some blocks",
    "dora": "an agent per block, merges pairs of tokens",
    "dora-prune": "an agent per block: whether tokens leave, how many, and which",
    "mstm": "fine-tunes: two scales, and what matters little merges into what it resembles",
    "evit": "fine-tunes: what the class token overlooks fuses into one token",
    "rl4evit-finetune": "fine-tunes the backbone under a policy that was trained before",
    "dynamicvit": "fine-tunes: predictors trained by gradient say which tokens leave",
    "ltm": "fine-tunes: learned masks merge tokens in a ViT, Swin, MobileViT or EfficientViT",
}
