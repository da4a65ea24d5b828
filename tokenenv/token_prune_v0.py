"""The PettingZoo module of the game: ``from tokenenv import token_prune_v0``."""

from tokenenv.envs.token_prune_pettingzoo import env, parallel_env, raw_env

__all__ = ["env", "parallel_env", "raw_env"]
