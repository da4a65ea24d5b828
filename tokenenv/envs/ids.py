"""The registered ids, and the class or function that each interface takes for an id."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import gymnasium
import pettingzoo

from tokenenv.errors import UserError

if TYPE_CHECKING:
    from tokenenv.envs.vector_base import GameVectorEnv


@dataclass(frozen=True)
class EnvId:
    """One registered environment.

    Entry points are strings, ``module:attribute``, so that registering imports neither torch nor
    timm.

    Attributes:
        id: ``tokenenv/Name-v0``, the same in both registries.
        summary: one line on what the agents decide.
        env: the ``gymnasium.Env``.
        vector_env: its batched ``gymnasium.vector.VectorEnv``.
        parallel: makes the PettingZoo parallel env; None if the game has a single agent.
        aec: makes the PettingZoo AEC env; None if the game has a single agent.
    """

    id: str
    summary: str
    env: str
    vector_env: str
    parallel: str | None = None
    aec: str | None = None


IDS = (
    EnvId(
        id="tokenenv/TokenPrune-v0",
        summary="one agent per visual token: keep or prune before some blocks (RL4EViT)",
        env="tokenenv.envs.token_prune_gym:TokenPruneEnv",
        vector_env="tokenenv.envs.token_prune_vector:TokenPruneVectorEnv",
        parallel="tokenenv.envs.token_prune_pettingzoo:parallel_env",
        aec="tokenenv.envs.token_prune_pettingzoo:env",
    ),
    EnvId(
        id="tokenenv/LayerMerge-v0",
        summary="one agent per block: how many similar tokens merge (DORA)",
        env="tokenenv.envs.layer_merge_gym:LayerMergeEnv",
        vector_env="tokenenv.envs.layer_vector:LayerMergeVectorEnv",
        parallel="tokenenv.layer_merge_v0:parallel_env",
        aec="tokenenv.layer_merge_v0:env",
    ),
    EnvId(
        id="tokenenv/LayerPrune-v0",
        summary="one agent per block: how many tokens are pruned (DORA-pruning)",
        env="tokenenv.envs.layer_prune_gym:LayerPruneEnv",
        vector_env="tokenenv.envs.layer_vector:LayerPruneVectorEnv",
        parallel="tokenenv.layer_prune_v0:parallel_env",
        aec="tokenenv.layer_prune_v0:env",
    ),
)


@dataclass(frozen=True)
class Preset:
    """An id for an environment of :data:`IDS` with other defaults.

    Attributes:
        id: as of :class:`EnvId`.
        of: the id of the environment.
        summary: one line on what is different.
        defaults: arguments of :func:`~tokenenv.game.build.build_game`, in place of its own.
    """

    id: str
    of: str
    summary: str
    defaults: dict[str, Any]


PRESETS = (
    Preset(
        id="tokenenv/TokenPruneLarge-v0",
        of="tokenenv/TokenPrune-v0",
        summary="the same with 576 agents, on digits among clutter",
        defaults={"model": "scenes_vit_patch2"},
    ),
)


def listing() -> str:
    """Every id with its summary, one line each."""
    width = max(len(entry.id) for entry in (*IDS, *PRESETS))
    return "\n".join(f"{entry.id:<{width}}  {entry.summary}" for entry in (*IDS, *PRESETS))


def vector_class(id: str) -> type[GameVectorEnv]:
    """The batched environment of a registered id.

    Raises:
        UserError: unknown id.
    """
    known = {entry.id: entry.vector_env for entry in IDS}
    if id not in known:
        raise UserError(f"unknown id '{id}': choose from {', '.join(known)}")
    module, name = known[id].split(":")
    made: type[GameVectorEnv] = getattr(import_module(module), name)
    return made


def register() -> None:
    """Register all ids with Gymnasium, and with PettingZoo from 1.27, its first registry."""
    for entry in IDS:
        _register(entry.id, entry, {})
        for preset in PRESETS:
            if preset.of == entry.id:
                _register(preset.id, entry, preset.defaults)


def _register(id: str, entry: EnvId, defaults: dict[str, Any]) -> None:
    gymnasium.register(id, entry.env, vector_entry_point=entry.vector_env, kwargs=defaults)
    if hasattr(pettingzoo, "register"):
        if entry.parallel:
            pettingzoo.register("parallel", id, entry.parallel, kwargs=defaults)
        if entry.aec:
            pettingzoo.register("aec", id, entry.aec, kwargs=defaults)
