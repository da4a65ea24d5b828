"""Policies of a training on its way, kept to measure how the score grows with the episodes."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenenv.game.policy import Method


@dataclass
class Stages:
    """The policies that a learner had after some of its episodes.

    Attributes:
        every: episodes between two stages; 0: none are kept.
        kept: the policies by name, by the number of episodes before.
    """

    every: int = 0
    kept: dict[int, dict[str, Method]] = field(default_factory=dict)

    def due(self, episodes: int, part: str) -> bool:
        """Whether the policy ``part`` is due: at the start and once in ``every`` episodes."""
        if not self.every:
            return False
        last = max((at for at, parts in self.kept.items() if part in parts), default=None)
        return last is None or episodes // self.every > last // self.every

    def keep(self, episodes: int, part: str, policy: Method) -> None:
        """Keep the policy ``part`` as it is after ``episodes``."""
        self.kept.setdefault(episodes, {})[part] = policy
