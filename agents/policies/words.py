"""Methods by their names on the command line: ``keep-all``, ``random:keep=0.7``, a run folder."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_type_hints

from agents.policies import POLICY, SHIPPED, load, shipped
from agents.policies.beam import BeamMerge, BeamPrune
from agents.policies.calibrated import DToMe, MeanCounts
from agents.policies.heuristics import (
    KeepAll,
    MergeAbove,
    MergeRandom,
    MergeStrongest,
    RandomPrune,
    TopK,
    check_pairs,
    decreasing,
)
from tokenenv.errors import UserError, did_you_mean
from tokenenv.game.checks import check_threshold, spread_blocks
from tokenenv.game.policy import Method, Policy, as_method
from tokenenv.game.rules import LayerMerge, TokenPrune
from tokenenv.own import load_own, split_own
from tokenenv.reducers import REDUCERS, Reducer
from tokenenv.words import Words, is_readable

N = TypeVar("N", int, float)


class Word(NamedTuple):
    """A policy's name on the command line.

    Attributes:
        usage: its arguments, and what it does, in one line.
        build: makes the policy from its arguments and the number of the model's blocks.
    """

    usage: str
    build: Callable[[Words, int], Policy]


def usages() -> dict[str, str]:
    """The usage line of every method that needs no training."""
    policies = {name: word.usage for name, word in WORDS.items()}
    return policies | {name: _usage(name, reducer) for name, reducer in REDUCERS.items()}


def _usage(name: str, reducer: type[Reducer]) -> str:
    """A reducer's usage line; one that has none lists its fields."""
    names = [field.name for field in fields(reducer) if field.name != "depth"]
    return reducer.usage or f"{name} takes {', '.join(names) or 'no arguments'}"


def parse_policy(what: str, depth: int, trust: bool = False) -> Method:
    """A method by name.

    Args:
        what: one of :func:`usages`; a run folder, or the name of a shipped policy, which may end in
            ``:threshold=0.6`` if the policy has a threshold; or ``module:Name:key=value``, or
            ``path/to/file.py:Name:key=value``, of a reducer, a policy or a function that returns
            one.
        depth: number of blocks of the model, for the default decision blocks.
        trust: whether a user's own code that a folder's file names may be run.

    Raises:
        UserError: unknown name, unknown or missing argument, value out of range.
    """
    name, rest = split_name(what)
    known = usages()
    own = None if name in known or os.path.isdir(name) else split_own(what)
    if not (own or name in known or os.path.isdir(name) or name in shipped()):
        if name.endswith(".py"):
            raise UserError(f"'{what}' names a file and nothing in it: write {name}:Name")
        names = [*known, *shipped()]
        raise UserError(
            f"'{what}' is neither a run folder nor a policy: choose from {', '.join(names)}"
            f"{did_you_mean(name, names)}"
        )
    usage = known.get(name, "what was learned takes none but threshold=...")
    words = Words(what, rest, usage)
    method: Method
    if own:
        method = _own(what, *own, depth)
    elif name in WORDS:
        method = WORDS[name].build(words, depth)
    elif name in REDUCERS:
        method = REDUCERS[name].from_words(words, depth)
    else:
        method = _learned(words, load(name, trust))
    if not own:
        words.check_all_read()
    return method


def split_name(what: str) -> tuple[str, str]:
    """``"tome:r=8"`` -> ``("tome", "r=8")``; the name of a folder may hold a colon."""
    if os.path.isdir(what):
        return what, ""
    name, _, rest = what.partition(":")
    return (name, rest) if name in usages() else split_own(what) or (name, rest)


def plain(what: str) -> str:
    """A folder by one name: ``./runs/a/`` is ``runs/a``; ``./evit`` stays, ``evit`` is a method."""
    known = usages()
    if what in known or not os.path.isdir(what):
        return what
    folder = os.path.normpath(what)
    return os.path.join(".", folder) if folder in known else folder


def code_of(what: str) -> str:
    """A digest of the source of a user's own method; empty for any other name."""
    own = None if split_name(what)[0] in usages() else split_own(what)
    return load_own(own[0]).origin.get("sha256", "") if own else ""


def folder_of(what: str) -> Path | None:
    """Where a run or a shipped policy is kept; None for anything else."""
    name = split_name(what)[0]
    folder = SHIPPED / name if name in shipped() else Path(name)
    kept = name not in usages() and os.path.isfile(folder / POLICY)
    return folder if kept else None


def _own(what: str, word: str, rest: str, depth: int) -> Method:
    """A method that a user's module or file defines: a class, a function that makes one, or one."""
    found = load_own(word).object
    wanted = (
        "name a subclass of tokenenv.reducers.Reducer or of tokenenv.Policy, an instance of one, "
        "or a function that returns one"
    )
    decides = hasattr(found, "act") or isinstance(found, Method)
    if isinstance(found, type):
        fits = decides or issubclass(found, Method)
    else:
        fits = decides or callable(found)
    if not fits:
        raise UserError(f"'{word}' is {found!r:.60}: {wanted}")
    if not isinstance(found, type) and decides:
        if rest:
            raise UserError(f"'{word}' is a method already: leave ':{rest}' out")
        return as_method(found)
    reads = _reducer if isinstance(found, type) and issubclass(found, Reducer) else _called
    try:
        made = reads(found, what, word, rest, depth)
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(
            f"'{what}' can't be made ({reason}): correct it; tokenenv --traceback shows the line"
        ) from error
    try:
        return as_method(made)
    except UserError:
        raise UserError(f"'{word}' makes {made!r:.60}: {wanted}") from None


def _reducer(cls: type[Reducer], what: str, word: str, rest: str, depth: int) -> Reducer:
    """A reducer from its class and the words for its fields."""
    own = [
        name for name, kind in inspect.get_annotations(cls).items() if "ClassVar" not in str(kind)
    ]
    known = [field.name for field in fields(cls)]
    lost = next((name for name in own if name not in known), None)
    if lost:
        raise UserError(
            f"'{word}' has a field '{lost}' that can't be set: write @dataclass(frozen=True) above "
            "the class"
        )
    words = Words(what, rest, _usage(word, cls))
    made = cls.from_words(words, depth)
    words.check_all_read()
    return made


def _called(make: Callable[..., Any], what: str, word: str, rest: str, depth: int) -> Any:
    """What a class or a function returns for the words; ``depth`` is the model's, if it is asked.

    A word is read as the type of its parameter: the annotation, else the type of the default.
    """
    taken = {
        name: parameter
        for name, parameter in inspect.signature(make).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    names = [name for name in taken if name != "depth"]
    words = Words(what, rest, f"{word} takes {', '.join(names) or 'no arguments'}")
    given: dict[str, Any] = {}
    for name, parameter in taken.items():
        if name == "depth":
            given[name] = depth
        elif words.has(name):
            given[name] = words.value(name, _type_of(make, parameter), 1)
        elif parameter.default is parameter.empty:
            raise words.missing(name)
    words.check_all_read()
    return make(**given)


def _type_of(make: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """As what type to read a word for a parameter."""
    function = make.__init__ if isinstance(make, type) else make  # type: ignore[misc]
    hints = {}
    with contextlib.suppress(NameError, TypeError):  # not importable, or no function with hints
        hints = get_type_hints(function)
    if parameter.name in hints:
        return hints[parameter.name]
    if isinstance(parameter.default, tuple):
        return tuple[int, ...]
    kind = type(parameter.default)
    return kind if is_readable(kind) else str


def _learned(words: Words, policy: Method) -> Method:
    if not words.has("threshold"):
        return policy
    threshold = words.number("threshold")
    if not policy.adjustable:
        raise UserError(f"'{words.what}': this policy decides without a threshold: leave it out")
    try:
        policy.threshold = check_threshold(threshold)
    except UserError as error:
        raise UserError(f"'{words.what}': {error}") from None
    return policy


def _tokens(words: Words, depth: int) -> TokenPrune:
    return TokenPrune(words.blocks(spread_blocks(depth)), features=("progress",), share=False)


def _pairs(words: Words, depth: int, **options: bool) -> LayerMerge:
    return LayerMerge(words.blocks(tuple(range(depth))), **options)  # type: ignore[arg-type]


def _tome(words: Words, depth: int) -> Policy:
    pairs = _pairs(
        words, depth, proportional=words.flag("proportional"), shuffle=words.flag("shuffle")
    )
    run = words.inside("r", "mean")
    if run is not None:
        return MeanCounts(pairs, parse_policy(run, depth), words.text("images", ""))
    r: int | tuple[int, ...]
    if words.choice("schedule", "constant", "decreasing") == "decreasing":
        r = decreasing(check_pairs(words.whole("r")), len(pairs.blocks))
    else:
        r = _one_or_each(words.wholes("r"))
    return MergeStrongest(pairs, r)


def _beam(kind: Callable[..., Policy], words: Words, rules: LayerMerge | TokenPrune) -> Policy:
    given = {name: words.whole(name) for name in ("width", "tries") if words.has(name)}
    return kind(words.number("price"), **given, rules=rules)


def _one_or_each(numbers: tuple[N, ...]) -> N | tuple[N, ...]:
    """A single number alone, which stands for all blocks."""
    return numbers if len(numbers) > 1 else numbers[0]


WORDS: dict[str, Word] = {
    "keep-all": Word(
        "prunes nothing; the dense model run as a game",
        lambda words, depth: KeepAll(_tokens(words, depth)),
    ),
    "random": Word(
        "random:keep=0.7[,blocks=3/6/9][,seed=0]; keep=0.5..0.9 draws a ratio per image",
        lambda words, depth: RandomPrune(_tokens(words, depth), words.range("keep"), words.seed()),
    ),
    "cls-attention": Word(
        "cls-attention:keep=0.7[,blocks=3/6/9]: top-k by class attention",
        lambda words, depth: TopK(_tokens(words, depth), words.number("keep"), "cls_attention"),
    ),
    "norm": Word(
        "norm:keep=0.7[,blocks=3/6/9]: top-k by norm of the embedding",
        lambda words, depth: TopK(_tokens(words, depth), words.number("keep"), "norm"),
    ),
    "tome": Word(
        "tome:r=8[,blocks=0/1/2][,schedule=decreasing][,proportional=0][,shuffle=0]: merges the 8 "
        "most similar pairs in every block (ToMe); r=8/6/4 block by block; decreasing from 16 to "
        "0; shuffle=0 keeps the order of the patches; r=mean(RUN)[,images=DIR]: the mean counts of "
        "another method on images",
        _tome,
    ),
    "random-merge": Word(
        "random-merge:r=8[,blocks=0/1/2][,seed=0]: merges 8 random pairs of ToMe's matching",
        lambda words, depth: MergeRandom(_pairs(words, depth), words.whole("r"), words.seed()),
    ),
    "merge-above": Word(
        "merge-above:similarity=0.9[,blocks=0/1/2]: merges all pairs at least so similar; "
        "similarity=0.9/0.8/0.8 block by block",
        lambda words, depth: MergeAbove(
            _pairs(words, depth), _one_or_each(words.numbers("similarity"))
        ),
    ),
    "dtome": Word(
        "dtome:r=8[,images=DIR][,blocks=3/4/5]: merge-above with a threshold for each block, such "
        "that 8 pairs merge on average over the images (DToMe)",
        lambda words, depth: DToMe(
            _pairs(words, depth), _one_or_each(words.wholes("r")), words.text("images", "")
        ),
    ),
    "beam-merge": Word(
        "beam-merge:price=1[,width=4][,tries=5][,blocks=0/1/2]: an oracle: plans with the model, "
        "by beam search, how many pairs merge, for the least KL to the dense one + price x MACs; "
        "the search is not counted",
        lambda words, depth: _beam(BeamMerge, words, _pairs(words, depth)),
    ),
    "beam-prune": Word(
        "beam-prune:price=1[,width=4][,tries=5][,blocks=3/6/9]: the same for how many tokens are "
        "pruned, those of least class attention first",
        lambda words, depth: _beam(BeamPrune, words, _tokens(words, depth)),
    ),
}
"""Heuristic policies by name; for reducers see :data:`tokenenv.reducers.REDUCERS`."""
