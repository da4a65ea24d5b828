"""The state of a game between updates, and the closed loop on the price in its reward."""

from __future__ import annotations

from typing import Any

from agents.policies.trainable import Trainable
from agents.systems.base import PolicyConfig
from agents.training.judgement import Judge, Judgement
from tokenenv.artefact import Unfit, Within, fits
from tokenenv.game import Game

_MOST = 1e9
"""The largest price that a checkpoint may hold."""


class PricedGame:
    """A game whose reward may have a price, which is adjusted after every judgement of the policy.

    A resumed run restores that price and the order of the game's images.

    Args:
        game: the game that is learned from.
        config: gives the next price, see :meth:`~agents.systems.base.PolicyConfig.next_price`.
        judge: measures a policy.
    """

    def __init__(self, game: Game, config: PolicyConfig, judge: Judge) -> None:
        self.game, self._config, self._judge = game, config, judge

    def judge(self, policy: Trainable) -> Judgement:
        """Measure the policy, and set the price that follows from the result."""
        found = self._judge(policy)
        price = self.game.reward.price
        if price is not None:
            self.game.reward = self.game.reward.with_price(self._config.next_price(price, found))
        return found

    def state_dict(self) -> dict[str, Any]:
        """The order of the images and the price, as tensors and numbers."""
        return {"stream": self.game.stream.state_dict(), "price": self.game.reward.price}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ArithmeticError, KeyError, TypeError, ValueError: it is no such state.
        """
        self.game.stream.load_state_dict(state["stream"])
        if self.game.reward.price is not None:
            price = state["price"]
            if not fits(price, Within(0.0, _MOST)):
                raise Unfit(f"the reward's price is {price!r:.40}")
            self._config.next_price(price, Judgement(0.0, 0.0, 0.0))  # raises if none follows
            self.game.reward = self.game.reward.with_price(price)
