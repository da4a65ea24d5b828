"""PettingZoo's classic form: ``from tokenenv import token_prune_v0``."""

from tokenenv.envs.token_prune import env, parallel_env, raw_env

__all__ = ["env", "parallel_env", "raw_env"]
