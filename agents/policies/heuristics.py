"""Policies without learning, as baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenenv.artefact import check_annotated
from tokenenv.errors import UserError
from tokenenv.game.checks import check_keep
from tokenenv.game.episode import Episode
from tokenenv.game.policy import Policy
from tokenenv.game.rules import RULES, LayerMerge, Observation, TokenPrune
from tokenenv.game.rules.layer_merge import scaled
from tokenenv.game.stored import describe, remake
from tokenenv.reducers.base import share, share_of
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.reduction import highest, strongest


class Heuristic(Policy):
    """A policy without a network: a dataclass whose first field is its rules."""

    def config(self) -> dict[str, Any]:
        """The class, its rules and settings, as JSON."""
        assert is_dataclass(self)
        made_of = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        return made_of | {"class": type(self).__name__, "rules": describe(self.rules)}

    @classmethod
    def remade(cls, config: dict[str, Any], trust: bool = False) -> Any:
        """The policy with the settings of :meth:`config`."""
        rules = remake(config.pop("rules"), RULES.values(), trust)
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
        check_annotated(values, cls)
        return cls(rules=rules, **values)  # type: ignore[call-arg]


@dataclass
class KeepAll(Heuristic):
    """Keeps all tokens: the dense model, run as a game."""

    rules: TokenPrune

    def __post_init__(self) -> None:
        self.rules = replace(self.rules, features=("progress",), share=False)

    def left(self, backbone: Backbone, step: int, visual: int) -> int:
        """All of them."""
        return visual

    def next_action(self, episode: Episode) -> Tensor:
        """:meth:`act` without an observation, of which it reads nothing."""
        return torch.ones_like(episode.tokens.visual_alive, dtype=torch.long)

    def act(self, observation: Observation) -> Tensor:
        """``(B, A)`` int64 ones."""
        return torch.ones_like(observation.active, dtype=torch.long)


@dataclass
class RandomPrune(Heuristic):
    """Keeps a random ``ceil(keep n)`` of an image's ``n`` visual tokens at each decision.

    If ``keep`` is two ratios, each image draws one between them for all its decisions, so that the
    images of a batch differ in length.

    The policy has its own generator, and its samples depend on the order of the calls and of the
    tokens: the same images in another order, or in another execution, get other samples.
    """

    rules: TokenPrune
    keep: float | tuple[float, float]
    seed: int = 0
    _generator: torch.Generator | None = field(default=None, init=False, repr=False)
    _ratio: float | Tensor = field(default=1.0, init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.keep, tuple):
            low, high = self.keep
            check_keep(low)
            check_keep(high)
            if low > high:
                raise UserError(f"keep={low:g}..{high:g} must not fall: give the lower ratio first")
        else:
            check_keep(self.keep)
        self.rules = replace(self.rules, features=("progress",), share=False)

    def act(self, observation: Observation) -> Tensor:
        """``(B, A)`` int64, 1 for kept tokens."""
        device = observation.active.device
        if self._generator is None:
            self._generator = torch.Generator(device).manual_seed(self.seed)
        if observation.step == 0:
            self._ratio = self._draw(len(observation.active), self._generator)
        score = _drawn(observation.active.shape, self._generator)
        return keep_highest(score, observation.active, self._ratio)

    def left(self, backbone: Backbone, step: int, visual: int) -> int | None:
        """Known unless each image draws its own ratio."""
        return None if isinstance(self.keep, tuple) else share(visual, self.keep)

    def _draw(self, batch: int, generator: torch.Generator) -> float | Tensor:
        """The ratio, or ``(B, 1)`` a ratio for each image."""
        if not isinstance(self.keep, tuple):
            return self.keep
        low, high = self.keep
        return low + (high - low) * _drawn((batch, 1), generator)


@dataclass
class TopK(Heuristic):
    """Keeps the ``ceil(keep n)`` of an image's ``n`` visual tokens with the highest feature.

    ``feature="cls_attention"`` is EViT's criterion without the fused token (Liang et al. 2022,
    section 3.2), ``feature="norm"`` the norm of the embedding.
    """

    rules: TokenPrune
    keep: float
    feature: str = "cls_attention"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        self.rules = replace(self.rules, features=(self.feature,), share=False)

    def left(self, backbone: Backbone, step: int, visual: int) -> int:
        """``ceil(keep visual)``."""
        return share(visual, self.keep)

    def act(self, observation: Observation) -> Tensor:
        """``(B, A)`` int64, 1 for kept tokens."""
        score = observation.feature(self.feature)[..., 0]
        return keep_highest(score, observation.active, self.keep)


def keep_highest(score: Tensor, active: Tensor, keep: float | Tensor) -> Tensor:
    """``(B, A)`` int64, 1 for the ``ceil(keep n)`` highest of an image's ``n`` active scores.

    ``score`` and ``active`` are ``(B, A)``; ``keep`` is one ratio, or ``(B, 1)``.
    """
    count = share_of(active.sum(1, keepdim=True), keep)
    return highest(score.masked_fill(~active, -torch.inf), count).long()


@dataclass
class MergeStrongest(Heuristic):
    """ToMe (Bolya et al. 2023): merges the ``r`` most similar pairs in every block.

    ``r`` is one number for all blocks, or one for each. At most half of the tokens are merged in a
    block, as the matching has no more pairs. Under rules with ``shuffle`` the predictions equal
    those of the published code.
    """

    rules: LayerMerge
    r: int | tuple[int, ...]

    def __post_init__(self) -> None:
        for r in self._schedule:
            check_pairs(r)
        if len(self._schedule) != len(self.rules.blocks):
            raise UserError(
                f"r={'/'.join(map(str, self._schedule))} gives {len(self._schedule)} numbers for "
                f"{len(self.rules.blocks)} blocks: give one for all, or one for each"
            )
        self.rules = replace(self.rules, features=("similarity",), share=False)

    @property
    def _schedule(self) -> tuple[int, ...]:
        return self.r if isinstance(self.r, tuple) else (self.r,) * len(self.rules.blocks)

    def left(self, backbone: Backbone, step: int, visual: int) -> int:
        """``visual`` less the pairs merged."""
        return visual - merged_of(self.rules, backbone, visual, self._schedule[step])

    def next_action(self, episode: Episode) -> Tensor:
        """:meth:`act` by the similarities themselves, in fewer operations."""
        match = episode.moment.match
        assert match is not None
        return strongest(match, self._schedule[episode.step])

    def act(self, observation: Observation) -> Tensor:
        """``(B, A)`` int64, 1 for the pairs to merge."""
        score = observation.feature("similarity")[..., 0].masked_fill(
            ~observation.active, -torch.inf
        )
        return highest(score, self._schedule[observation.step]).long()


def decreasing(r: int, blocks: int) -> tuple[int, ...]:
    """ToMe's decreasing schedule (section 4): from ``2 r`` pairs in the first block to none.

    Numbers are rounded down as in the published code, so fewer are merged in all than with a
    constant ``r``.
    """
    last = max(blocks - 1, 1)
    return tuple(2 * r * (last - i) // last for i in range(blocks))


@dataclass
class MergeAbove(Heuristic):
    """Merges the pairs whose keys have a cosine of at least ``similarity``.

    ``similarity`` is one number for all blocks, or one for each.
    """

    rules: LayerMerge
    similarity: float | tuple[float, ...]

    def __post_init__(self) -> None:
        several = self._several
        if len(several) != len(self.rules.blocks):
            raise UserError(
                f"similarity={'/'.join(f'{each:g}' for each in several)} gives {len(several)} "
                f"numbers for {len(self.rules.blocks)} blocks: give one for all, or one for each"
            )
        for each in several:
            if not -1.0 <= each <= 1.0:
                raise UserError(f"similarity {each:g} is no cosine: give -1 to 1")
        self.rules = replace(self.rules, features=("similarity",), share=False)

    def next_action(self, episode: Episode) -> Tensor:
        """:meth:`act` by the similarities themselves, in fewer operations."""
        match = episode.moment.match
        assert match is not None
        return scaled(match.score) >= self._least(episode.step)

    def act(self, observation: Observation) -> Tensor:
        """``(B, A)`` int64, 1 for the pairs to merge."""
        return (observation.feature("similarity")[..., 0] >= self._least(observation.step)).long()

    @property
    def _several(self) -> tuple[float, ...]:
        given = self.similarity
        return given if isinstance(given, tuple) else (given,) * len(self.rules.blocks)

    def _least(self, step: int) -> float:
        """The threshold of a decision as the feature is scaled, and rounded alike."""
        return scaled(torch.tensor(self._several[step])).item()


@dataclass
class MergeRandom(Heuristic):
    """Merges ``r`` random pairs of the matching in every block; samples as RandomPrune's."""

    rules: LayerMerge
    r: int
    seed: int = 0
    _generator: torch.Generator | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check_pairs(self.r)
        self.rules = replace(self.rules, features=("similarity",), share=False)

    def left(self, backbone: Backbone, step: int, visual: int) -> int:
        """``visual`` less the pairs merged."""
        return visual - merged_of(self.rules, backbone, visual, self.r)

    def act(self, observation: Observation) -> Tensor:
        """``(B, A)`` int64, 1 for the pairs to merge."""
        device = observation.active.device
        if self._generator is None:
            self._generator = torch.Generator(device).manual_seed(self.seed)
        score = _drawn(observation.active.shape, self._generator)
        return highest(score.masked_fill(~observation.active, -torch.inf), self.r).long()


def _drawn(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Uniform numbers of a generator; of the runtime's own where torch exports the policy."""
    if torch.compiler.is_compiling():
        return torch.rand(tuple(shape), device=generator.device)
    return torch.rand(tuple(shape), generator=generator, device=generator.device)


def check_pairs(r: int) -> int:
    """``r``, unchanged.

    Raises:
        UserError: it is negative.
    """
    if r < 0:
        raise UserError(f"r={r} pairs to merge: give 0 or more")
    return r


def merged_of(rules: LayerMerge, backbone: Backbone, visual: int, r: int) -> int:
    """How many pairs are merged if ``r`` of the candidates among ``visual`` tokens are wanted."""
    return min(r, rules.candidates(visual, backbone.prefix)) if visual > 1 else 0
