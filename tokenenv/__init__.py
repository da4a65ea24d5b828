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
    from agents.policies import register_policy
    from agents.systems import register_system
    from agents.training import Run, train
    from tokenenv import (
        layer_merge_v0,
        layer_prune_v0,
        ltm,
        reducers,
        reduction,
        token_prune_v0,
    )
    from tokenenv.api.bench import bench
    from tokenenv.api.compare import compare
    from tokenenv.api.compress import compress
    from tokenenv.api.evaluate import evaluate
    from tokenenv.api.explore import explore
    from tokenenv.api.latency import latency_table
    from tokenenv.api.reproduce import reproduce
    from tokenenv.api.show import show
    from tokenenv.api.tune import tune
    from tokenenv.api.watch import watch
    from tokenenv.data import ImageSource, Preprocessing, open_source
    from tokenenv.deploy.compressed import CompressedViT, load_compressed
    from tokenenv.deploy.onnx import export_onnx
    from tokenenv.deploy.runtime import load_onnx
    from tokenenv.game import Game
    from tokenenv.game.build import build_game
    from tokenenv.game.policy import Method, Policy
    from tokenenv.game.rewards import (
        AlphaBeta,
        Cooperative,
        Dora,
        KeepTarget,
        Reward,
        register_reward,
    )
    from tokenenv.game.rules import LayerMerge, LayerPrune, Rules, TokenPrune, register_rules
    from tokenenv.reducers import register_reducer
    from tokenenv.vit.backbone import Backbone
    from tokenenv.vit.families import register_family
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
    "Method",
    "Policy",
    "Preprocessing",
    "Reward",
    "Rules",
    "Run",
    "TokenPrune",
    "UserError",
    "__version__",
    "bench",
    "build_game",
    "compare",
    "compress",
    "evaluate",
    "explore",
    "export_onnx",
    "latency_table",
    "layer_merge_v0",
    "layer_prune_v0",
    "load_backbone",
    "load_compressed",
    "load_onnx",
    "ltm",
    "open_source",
    "record",
    "reducers",
    "reduction",
    "register_family",
    "register_policy",
    "register_reducer",
    "register_reward",
    "register_rules",
    "register_system",
    "reproduce",
    "show",
    "token_prune_v0",
    "train",
    "tune",
    "watch",
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
    "bench": "api.bench",
    "compare": "api.compare",
    "compress": "api.compress",
    "evaluate": "api.evaluate",
    "explore": "api.explore",
    "reproduce": "api.reproduce",
    "show": "api.show",
    "latency_table": "api.latency",
    "tune": "api.tune",
    "watch": "api.watch",
    "record": "api.record",
    "Method": "game.policy",
    "Policy": "game.policy",
    "Reward": "game.rewards",
    "Rules": "game.rules",
    "register_family": "vit.families",
    "register_reducer": "reducers",
    "register_reward": "game.rewards",
    "register_rules": "game.rules",
    "export_onnx": "deploy.onnx",
    "load_backbone": "vit.load",
    "load_compressed": "deploy.compressed",
    "load_onnx": "deploy.runtime",
    "open_source": "data",
    "Preprocessing": "data",
}

_AGENTS_HOME = {
    "Run": "agents.training",
    "register_policy": "agents.policies",
    "register_system": "agents.systems",
    "train": "agents.training",
}

_MODULES = ("layer_merge_v0", "layer_prune_v0", "ltm", "reducers", "reduction", "token_prune_v0")


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
