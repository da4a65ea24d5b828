"""The Markov game: rules, rewards, episodes, and the protocol of policies."""

from tokenenv.game.game import Game, Transition

__all__ = ["Game", "Transition"]
