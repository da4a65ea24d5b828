"""What a game remembers from one update to the next, and the closed loop of its price."""

from __future__ import annotations

from typing import Any

from agents.policies.trainable import Trainable
from agents.systems.base import PolicyConfig
from agents.training.judgement import Judge, Judgement
from tokenenv.game import Game


class PricedGame:
    """A game whose reward may have a price, which then follows every judgement of the policy.

    That price and the order of the game's images are what a resumed run needs of a game.

    Args:
        game: the game that is learnt from.
        config: says what price follows, see :meth:`~agents.systems.base.PolicyConfig.next_price`.
        judge: measures a policy.
    """

    def __init__(self, game: Game, config: PolicyConfig, judge: Judge) -> None:
        self.game, self._config, self._judge = game, config, judge

    def judge(self, policy: Trainable) -> Judgement:
        """Judge the policy, and set the price that follows from it."""
        found = self._judge(policy)
        price = self.game.reward.price
        if price is not None:
            self.game.reward = self.game.reward.with_price(self._config.next_price(price, found))
        return found

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers."""
        return {"stream": self.game.stream.state_dict(), "price": self.game.reward.price}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.game.stream.load_state_dict(state["stream"])
        if self.game.reward.price is not None:
            self.game.reward = self.game.reward.with_price(state["price"])
