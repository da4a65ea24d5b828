"""Vision Transformer inference as a Markov game: agents decide which tokens go on.

Importing this package registers its environments with Gymnasium and PettingZoo. It imports
neither torch nor timm: the names below that need them are loaded when first used. Processes forked
afterwards compute with one thread of torch: with more they could wait for each other forever.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tokenenv._agents import require_own_agents
from tokenenv._version import __version__
from tokenenv.envs import ids
from tokenenv.errors import UserError
from tokenenv.forking import one_thread_in_forked_children

if TYPE_CHECKING:
    from agents.training import Run, train
    from tokenenv import layer_merge_v0, layer_prune_v0, ltm, token_prune_v0
    from tokenenv.data import ImageSource, open_source
    from tokenenv.deploy.compressed import CompressedViT, compress, load_compressed
    from tokenenv.deploy.onnx import export_onnx
    from tokenenv.game import Game
    from tokenenv.game.build import build_game
    from tokenenv.game.rewards import AlphaBeta, Cooperative, Dora, KeepTarget
    from tokenenv.game.rules import LayerMerge, LayerPrune, TokenPrune
    from tokenenv.vit.backbone import Backbone
    from tokenenv.vit.load import load_backbone

__all__ = [
    "AlphaBeta",
    "Backbone",
    "CompressedViT",
    "Cooperative",
    "Dora",
    "Game",
    "ImageSource",
    "KeepTarget",
    "LayerMerge",
    "LayerPrune",
    "Run",
    "TokenPrune",
    "UserError",
    "__version__",
    "build_game",
    "compress",
    "export_onnx",
    "layer_merge_v0",
    "layer_prune_v0",
    "load_backbone",
    "load_compressed",
    "ltm",
    "open_source",
    "token_prune_v0",
    "train",
]

_HOME = {
    "AlphaBeta": "game.rewards",
    "Backbone": "vit.backbone",
    "CompressedViT": "deploy.compressed",
    "Cooperative": "game.rewards",
    "Dora": "game.rewards",
    "Game": "game",
    "ImageSource": "data",
    "KeepTarget": "game.rewards",
    "LayerMerge": "game.rules",
    "LayerPrune": "game.rules",
    "TokenPrune": "game.rules",
    "build_game": "game.build",
    "compress": "deploy.compressed",
    "export_onnx": "deploy.onnx",
    "load_backbone": "vit.load",
    "load_compressed": "deploy.compressed",
    "open_source": "data",
}

_AGENTS_HOME = {"Run": "agents.training", "train": "agents.training"}

_MODULES = ("layer_merge_v0", "layer_prune_v0", "ltm", "token_prune_v0")


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"tokenenv.{_HOME[name]}"), name)
    if name in _AGENTS_HOME:
        require_own_agents()
        return getattr(import_module(_AGENTS_HOME[name]), name)
    if name in _MODULES:
        return import_module(f"tokenenv.{name}")
    raise AttributeError(f"module 'tokenenv' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)


ids.register()
one_thread_in_forked_children()
