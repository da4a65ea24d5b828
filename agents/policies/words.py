"""Policies by the words a user types: ``keep-all``, ``random:keep=0.7``, a run folder ..."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from agents.policies.actor import Policy, load, shipped
from agents.policies.heuristics import (
    KeepAll,
    MergeAbove,
    MergeRandom,
    MergeStrongest,
    Nobody,
    RandomPrune,
    TopK,
    check_pairs,
    decreasing,
)
from tokenenv.errors import UserError
from tokenenv.game.checks import spread_blocks
from tokenenv.game.rules import LayerMerge, TokenPrune
from tokenenv.reducers import ATS, MSTM, DiffRate, EViT, PiToMe, Resize, ZeroTPrune
from tokenenv.reducers.mstm import SIMILARITIES, WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Callable

HEURISTICS: dict[str, str] = {
    "keep-all": "nobody leaves; the dense model played as a game",
    "random": "random:keep=0.7[,blocks=3/6/9][,seed=0]; keep=0.5..0.9 draws a ratio per image",
    "cls-attention": "cls-attention:keep=0.7[,blocks=3/6/9]: top-k by class attention",
    "norm": "norm:keep=0.7[,blocks=3/6/9]: top-k by length of the embedding",
    "tome": "tome:r=8[,blocks=0/1/2][,schedule=decreasing][,proportional=0][,shuffle=0]: in every "
    "block the 8 most similar pairs merge (ToMe); r=8/6/4 block by block; decreasing from 16 to 0; "
    "shuffle=0 keeps the order of the patches",
    "random-merge": "random-merge:r=8[,blocks=0/1/2][,seed=0]: 8 random pairs of ToMe's matching",
    "merge-above": "merge-above:similarity=0.9[,blocks=0/1/2]: all pairs at least so similar",
    "evit": "evit:keep=0.7[,blocks=3/6/9][,fuse=0]: top-k by class attention, the others fuse into "
    "one (EViT) or with fuse=0 are dropped",
    "mstm": "mstm:keep=0.7[,blocks=3/6/9][,weight=importance|mean|size|soft]"
    "[,similarity=keys|tokens][,least=-1]: the others merge into the most similar (MSTM)",
    "pitome": "pitome:keep=0.9[,blocks=0/1/2][,alpha=1]: tokens that are like many merge (PiToMe)",
    "ats": "ats:tokens=100[,blocks=3/6/9]: at most 100 stay, sampled by significance (ATS); "
    "tokens=100/80/60 block by block",
    "zerotprune": "zerotprune:keep=0.7[,blocks=3/6/9][,alike=0.5][,rounds=5]: page rank of the "
    "attention graph, then likeness (Zero-TPrune)",
    "diffrate": "diffrate:prune=4,merge=4[,blocks=0/1/2]: the least heeded are dropped, the next "
    "merge (DiffRate); prune=6/4/2 block by block",
    "resize": "resize:size=192: the same model on smaller images",
}


def parse_policy(what: str, depth: int) -> Policy:
    """A policy by name.

    Args:
        what: a heuristic of :data:`HEURISTICS`, a run folder, or the name of a shipped policy; the
            last two may end in ``:threshold=0.6`` where the policy has a threshold.
        depth: number of blocks of the model, for the default decision blocks.

    Raises:
        UserError: unknown name, unknown or missing argument, value out of range.
    """
    name, rest = split_name(what)
    if not (name in HEURISTICS or Path(name).is_dir() or name in shipped()):
        known = ", ".join([*HEURISTICS, *shipped()])
        raise UserError(f"'{what}' is neither a run folder nor a policy: choose from {known}")
    words = _Words(what, rest)
    policy = _BUILDERS[name](words, depth) if name in _BUILDERS else _learned(words, load(name))
    words.check_all_read()
    return policy


def split_name(what: str) -> tuple[str, str]:
    """``"tome:r=8"`` -> ``("tome", "r=8")``; the name of a folder may hold a colon."""
    if Path(what).is_dir():
        return what, ""
    name, _, rest = what.partition(":")
    return name, rest


class _Words:
    """The arguments of a spec; what is read leaves."""

    def __init__(self, what: str, rest: str) -> None:
        pairs = [part.partition("=") for part in rest.split(",") if part]
        if any(not sep or not value for _, sep, value in pairs):
            raise UserError(f"'{what}': arguments have the form key=value, separated by commas")
        self.what, self._left = what, {key: value for key, _, value in pairs}
        if len(self._left) < len(pairs):
            raise UserError(f"'{what}': an argument is given twice: give each once")

    def check_all_read(self) -> None:
        if self._left:
            raise UserError(
                f"'{self.what}': unknown argument '{next(iter(self._left))}': {self._usage}"
            )

    @property
    def _usage(self) -> str:
        return HEURISTICS.get(
            self.what.partition(":")[0], "what was learned takes none but threshold=..."
        )

    def _text(self, key: str, default: str | None = None) -> str:
        text = self._left.pop(key, default)
        if text is None:
            raise UserError(f"'{self.what}' needs {key}=...: {self._usage}")
        return text

    def blocks(self, default: tuple[int, ...]) -> tuple[int, ...]:
        text = self._left.pop("blocks", None)
        if text is None:
            return default
        try:
            return tuple(int(part) for part in text.split("/"))
        except ValueError:
            raise UserError(
                f"'{self.what}': blocks={text} must be block indices such as 3/6/9"
            ) from None

    def seed(self) -> int:
        text = self._text("seed", "0")
        if not (text.isascii() and text.isdigit() and int(text) < 2**63):
            raise UserError(f"'{self.what}': seed={text} must be a whole number from 0 to 2^63 - 1")
        return int(text)

    def has(self, key: str) -> bool:
        return key in self._left

    def number(self, key: str, default: str | None = None) -> float:
        return self._float(key, self._text(key, default))

    def _float(self, key: str, text: str) -> float:
        try:
            return float(text)
        except ValueError:
            raise UserError(f"'{self.what}': {key}={text} is not a number") from None

    def range(self, key: str) -> float | tuple[float, float]:
        """One number, or two with ``..`` between them."""
        text = self._text(key)
        low, two, high = text.partition("..")
        return (self._float(key, low), self._float(key, high)) if two else self._float(key, text)

    def wholes(self, key: str, default: str | None = None) -> tuple[int, ...]:
        """Whole numbers with ``/`` between them."""
        numbers = [self._float(key, text) for text in self._text(key, default).split("/")]
        for value in numbers:
            if not value.is_integer() or abs(value) >= 2**31:
                raise UserError(f"'{self.what}': {key}={value:g} is not a whole number")
        return tuple(map(int, numbers))

    def whole(self, key: str, default: str | None = None) -> int:
        numbers = self.wholes(key, default)
        if len(numbers) > 1:
            raise UserError(f"'{self.what}': {key} takes one number: {self._usage}")
        return numbers[0]

    def each(self, key: str, blocks: tuple[int, ...]) -> tuple[int, ...]:
        """A whole number for each block; a single one is for all."""
        numbers = self.wholes(key)
        return numbers * len(blocks) if len(numbers) == 1 else numbers

    def flag(self, key: str) -> bool:
        """1 by default, or 0."""
        text = self._text(key, "1")
        if text not in ("0", "1"):
            raise UserError(f"'{self.what}': {key}={text} must be 0 or 1")
        return text == "1"

    def choice(self, key: str, *known: str) -> str:
        """One of ``known``, the first by default."""
        text = self._text(key, known[0])
        if text not in known:
            raise UserError(f"'{self.what}': {key}={text}: choose from {', '.join(known)}")
        return text


def _learned(words: _Words, policy: Policy) -> Policy:
    if not words.has("threshold"):
        return policy
    threshold = words.number("threshold")
    # With more than two actions the likeliest is taken, and no threshold asked.
    if not hasattr(policy, "threshold") or getattr(policy, "actions", 2) != 2:
        raise UserError(f"'{words.what}': this policy decides without a threshold: leave it out")
    if not 0 < threshold < 1:
        raise UserError(
            f"'{words.what}': threshold={threshold:g} is no probability: give more than 0, below 1"
        )
    policy.threshold = threshold
    return policy


def _tokens(words: _Words, depth: int) -> TokenPrune:
    return TokenPrune(words.blocks(spread_blocks(depth)), features=("progress",), share=False)


def _pairs(words: _Words, depth: int, **options: bool) -> LayerMerge:
    return LayerMerge(words.blocks(tuple(range(depth))), **options)  # type: ignore[arg-type]


def _tome(words: _Words, depth: int) -> Policy:
    pairs = _pairs(
        words, depth, proportional=words.flag("proportional"), shuffle=words.flag("shuffle")
    )
    r: int | tuple[int, ...]
    if words.choice("schedule", "constant", "decreasing") == "decreasing":
        r = decreasing(check_pairs(words.whole("r")), len(pairs.blocks))
    else:
        several = words.wholes("r")
        r = several if len(several) > 1 else several[0]
    return MergeStrongest(pairs, r)


def _evit(words: _Words, depth: int) -> Policy:
    blocks = words.blocks(spread_blocks(depth))
    return Nobody(EViT(blocks, words.number("keep"), words.flag("fuse")))


def _mstm(words: _Words, depth: int) -> Policy:
    blocks, keep = words.blocks(spread_blocks(depth)), words.number("keep")
    weight: Any = words.choice("weight", *WEIGHTS)
    similarity: Any = words.choice("similarity", *SIMILARITIES)
    return Nobody(MSTM(blocks, keep, weight, similarity, words.number("least", "-1")))


def _pitome(words: _Words, depth: int) -> Policy:
    blocks = words.blocks(tuple(range(depth)))
    return Nobody(PiToMe(blocks, words.number("keep"), depth, words.number("alpha", "1")))


def _ats(words: _Words, depth: int) -> Policy:
    blocks = words.blocks(spread_blocks(depth))
    return Nobody(ATS(blocks, words.each("tokens", blocks)))


def _zerotprune(words: _Words, depth: int) -> Policy:
    blocks = words.blocks(spread_blocks(depth))
    alike, rounds = words.number("alike", "0.5"), words.whole("rounds", "5")
    return Nobody(ZeroTPrune(blocks, words.number("keep"), alike, rounds))


def _diffrate(words: _Words, depth: int) -> Policy:
    blocks = words.blocks(tuple(range(depth)))
    return Nobody(DiffRate(blocks, words.each("prune", blocks), words.each("merge", blocks)))


_BUILDERS: dict[str, Callable[[_Words, int], Policy]] = {
    "keep-all": lambda words, depth: KeepAll(_tokens(words, depth)),
    "random": lambda words, depth: RandomPrune(
        _tokens(words, depth), words.range("keep"), words.seed()
    ),
    "cls-attention": lambda words, depth: TopK(
        _tokens(words, depth), words.number("keep"), "cls_attention"
    ),
    "norm": lambda words, depth: TopK(_tokens(words, depth), words.number("keep"), "norm"),
    "tome": _tome,
    "random-merge": lambda words, depth: MergeRandom(
        _pairs(words, depth), words.whole("r"), words.seed()
    ),
    "merge-above": lambda words, depth: MergeAbove(
        _pairs(words, depth), words.number("similarity")
    ),
    "evit": _evit,
    "mstm": _mstm,
    "pitome": _pitome,
    "ats": _ats,
    "zerotprune": _zerotprune,
    "diffrate": _diffrate,
    "resize": lambda words, depth: Nobody(Resize(size=words.whole("size"))),
}
