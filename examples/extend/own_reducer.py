"""A reducer of your own beside ToMe: the tokens with the longest values stay.

Run ``python own_reducer.py``, or ``tokenenv compare 'own_reducer.py:LongestValues:keep=0.8|0.6'``.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

import tokenenv
from tokenenv.reducers import Reducer
from tokenenv.reduction import highest, prune
from tokenenv.vit.backbone import Context
from tokenenv.vit.tokens import Tokens


@dataclass(frozen=True)
class LongestValues(Reducer):
    """At each of ``blocks``, the share ``keep`` of the tokens with the longest values stays."""

    keep: float = 0.7
    reads: ClassVar[tuple[str, ...]] = ("value_norms",)

    def reduce(self, tokens: Tokens, context: Context, step: int) -> Tokens:
        """The tokens ``(B, N)`` that stay."""
        alive = tokens.visual_alive
        length = context.value_norms[:, tokens.prefix :].masked_fill(~alive, -torch.inf)
        count = (self.keep * alive.sum(1, keepdim=True)).ceil()
        return prune(tokens, highest(length, count))


if __name__ == "__main__":
    for what in (LongestValues(blocks=(3, 6, 9), keep=0.6), "tome:r=4"):
        print(tokenenv.evaluate(what, limit=200))
