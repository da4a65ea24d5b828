"""The Markov game: rules, rewards, and the walk of images through the model between decisions."""

from tokenenv.game.game import Game, Transition

__all__ = ["Game", "Transition"]
