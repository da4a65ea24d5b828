"""The PettingZoo module of the game: ``from tokenenv import layer_merge_v0``."""

from __future__ import annotations

from typing import Any

from pettingzoo import AECEnv

from tokenenv.envs.layer_pettingzoo import LayerMergeAECEnv, LayerMergeParallelEnv
from tokenenv.envs.pettingzoo_base import OrderedEnv

__all__ = ["env", "parallel_env", "raw_env"]


def parallel_env(**kwargs: Any) -> LayerMergeParallelEnv:
    """Make the parallel env, with the arguments of :class:`LayerMergeParallelEnv`."""
    return LayerMergeParallelEnv(**kwargs)


def raw_env(**kwargs: Any) -> LayerMergeAECEnv:
    """Make the AEC env without PettingZoo's usual wrappers."""
    return LayerMergeAECEnv(**kwargs)


def env(**kwargs: Any) -> AECEnv[str, Any, Any]:
    """Make the AEC env with PettingZoo's usual wrappers."""
    return OrderedEnv(raw_env(**kwargs))
