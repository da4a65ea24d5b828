"""The source of methods of a user's own, for tests that write it to a file."""

METHODS = """
from __future__ import annotations
from dataclasses import dataclass
from typing import ClassVar

import torch

import agents
from tokenenv import Policy, TokenPrune
from tokenenv.game.stored import describe, remake
from tokenenv.reducers import Reducer
from tokenenv.reduction import highest, prune

@dataclass(frozen=True)
class First(Reducer):
    keep: float = 0.5
    least: int | None = None

    def reduce(self, tokens, context, step):
        count = (self.keep * tokens.visual_alive.sum(1, keepdim=True)).ceil()
        if self.least is not None:
            count = count.clamp(min=self.least)
        return prune(tokens, highest(torch.where(tokens.visual_alive, 1.0, -torch.inf), count))

@dataclass(frozen=True)
class Twice(TokenPrune):
    pass

class Left(Policy):
    def __init__(self, depth=12, keep=0.5, rules=None):
        at = (depth // 3, 2 * depth // 3)
        self.rules, self.keep = rules or Twice(at, features=("progress",), share=False), keep

    def act(self, observation):
        active = observation.active
        return (active & (active.cumsum(1) <= self.keep * active.sum(1, keepdim=True))).long()

    def config(self):
        return {"class": "Left", "rules": describe(self.rules), "keep": self.keep}

    @classmethod
    def remade(cls, config, trust=False):
        return cls(rules=remake(config["rules"], [], trust), keep=config["keep"])

def make(depth, keep=0.5):
    assert depth == 12 and isinstance(keep, float)
    return First((3, 6, 9), keep)

def words(blocks: tuple[int, ...], name="first", fast: bool = False):
    assert (name, fast) == ("second", True)
    return First(blocks, 0.5)

ready = Left(keep=0.5)

class Duck:
    def __init__(self):
        self.rules = ready.rules

    def act(self, observation):
        return ready.act(observation)

    def macs(self, agents, removed):
        return torch.zeros_like(agents)

class Loose(Reducer):
    keep: float = 0.5

@dataclass(frozen=True)
class Needy(Reducer):
    ratio: float
    table: dict

class Neither:
    pass

def fails(keep=0.5):
    raise LookupError("no table for this")

def five():
    return 5

number = 5
"""
