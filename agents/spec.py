"""Policies by the words a user types: ``keep-all``, ``random:keep=0.7``, a run folder ..."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from agents.heuristics import (
    KeepAll,
    MergeAbove,
    MergeRandom,
    MergeStrongest,
    Nobody,
    RandomPrune,
    TopK,
)
from agents.policy import Policy, load, shipped
from tokenenv.errors import UserError
from tokenenv.reducers import MSTM, EViT
from tokenenv.rules import LayerMerge, TokenPrune
from tokenenv.rules.token_prune import spread_blocks

if TYPE_CHECKING:
    from collections.abc import Callable

HEURISTICS: dict[str, str] = {
    "keep-all": "nobody leaves; the dense model played as a game",
    "random": "random:keep=0.7[,blocks=3/6/9][,seed=0]; keep=0.5..0.9 draws a ratio per image",
    "cls-attention": "cls-attention:keep=0.7[,blocks=3/6/9]: top-k by class attention (EViT)",
    "norm": "norm:keep=0.7[,blocks=3/6/9]: top-k by length of the embedding",
    "tome": "tome:r=8[,blocks=0/1/2]: in every block the 8 most similar pairs merge (ToMe)",
    "random-merge": "random-merge:r=8[,blocks=0/1/2][,seed=0]: 8 random pairs of ToMe's matching",
    "evit": "evit:keep=0.7[,blocks=3/6/9][,fuse=1]: top-k by class attention, the rest fuse (EViT)",
    "mstm": "mstm:keep=0.7[,blocks=3/6/9][,weight=importance|mean|size|soft]"
    "[,similarity=keys|tokens][,least=-1]: the others merge into the most similar (MSTM)",
    "merge-above": "merge-above:similarity=0.9[,blocks=0/1/2]: all pairs at least so similar",
}


def parse_policy(what: str, depth: int) -> Policy:
    """A policy by name.

    Args:
        what: a heuristic of :data:`HEURISTICS`, a run folder, or the name of a shipped policy.
        depth: number of blocks of the model, for the default decision blocks.

    Raises:
        UserError: unknown name, unknown or missing argument, value out of range.
    """
    name, _, rest = what.partition(":")
    if name not in HEURISTICS:
        if Path(what).is_dir() or what in shipped():
            return load(what)
        known = ", ".join([*HEURISTICS, *shipped()])
        raise UserError(f"'{what}' is neither a run folder nor a policy: choose from {known}")
    arguments = _arguments(what, rest)
    blocks = arguments.pop("blocks", None)
    chosen = _blocks(what, blocks) if blocks is not None else None
    tokens = TokenPrune(chosen or spread_blocks(depth), features=("position",), share=False)
    pairs = LayerMerge(chosen or tuple(range(depth)))
    builders: dict[str, Callable[[], Policy]] = {
        "keep-all": lambda: KeepAll(tokens),
        "random": lambda: RandomPrune(
            tokens, _range(what, arguments, "keep"), _seed(what, arguments)
        ),
        "cls-attention": lambda: TopK(tokens, _number(what, arguments, "keep"), "cls_attention"),
        "norm": lambda: TopK(tokens, _number(what, arguments, "keep"), "norm"),
        "tome": lambda: MergeStrongest(pairs, _whole(what, arguments, "r")),
        "random-merge": lambda: MergeRandom(
            pairs, _whole(what, arguments, "r"), _seed(what, arguments)
        ),
        "evit": lambda: Nobody(
            EViT(tokens.blocks, _number(what, arguments, "keep"), _switch(what, arguments, "fuse"))
        ),
        "mstm": lambda: Nobody(
            MSTM(
                tokens.blocks,
                _number(what, arguments, "keep"),
                _word(arguments, "weight", "importance"),
                _word(arguments, "similarity", "keys"),
                _number(what, arguments, "least", default="-1"),
            )
        ),
        "merge-above": lambda: MergeAbove(pairs, _number(what, arguments, "similarity")),
    }
    policy = builders[name]()
    if arguments:
        raise UserError(f"'{what}': unknown argument '{next(iter(arguments))}': {HEURISTICS[name]}")
    return policy


def _arguments(what: str, rest: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in rest.split(",") if part]
    if any(not sep or not value for _, sep, value in pairs):
        raise UserError(f"'{what}': arguments have the form key=value, separated by commas")
    return {key: value for key, _, value in pairs}


def _blocks(what: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split("/"))
    except ValueError:
        raise UserError(f"'{what}': blocks={text} must be block indices such as 3/6/9") from None


def _seed(what: str, arguments: dict[str, str]) -> int:
    text = arguments.pop("seed", "0")
    if not (text.isascii() and text.isdigit() and int(text) < 2**63):
        raise UserError(f"'{what}': seed={text} must be a whole number from 0 to 2^63 - 1")
    return int(text)


def _whole(what: str, arguments: dict[str, str], key: str) -> int:
    value = _number(what, arguments, key)
    if not value.is_integer() or abs(value) >= 2**31:
        raise UserError(f"'{what}': {key}={value:g} is not a whole number of tokens")
    return int(value)


def _switch(what: str, arguments: dict[str, str], key: str) -> bool:
    text = arguments.pop(key, "1")
    if text not in ("0", "1"):
        raise UserError(f"'{what}': {key}={text} must be 0 or 1")
    return text == "1"


def _range(what: str, arguments: dict[str, str], key: str) -> float | tuple[float, float]:
    """One number, or two with ``..`` between them."""
    low, two, high = arguments.get(key, "").partition("..")
    if not two:
        return _number(what, arguments, key)
    del arguments[key]
    return _number(what, {key: low}, key), _number(what, {key: high}, key)


def _word(arguments: dict[str, str], key: str, default: str) -> Any:
    """Any word; who takes it says which ones there are."""
    return arguments.pop(key, default)


def _number(what: str, arguments: dict[str, str], key: str, default: str | None = None) -> float:
    text = arguments.pop(key, default)
    if text is None:
        raise UserError(f"'{what}' needs {key}=...: {HEURISTICS[what.partition(':')[0]]}")
    try:
        return float(text)
    except ValueError:
        raise UserError(f"'{what}': {key}={text} is not a number") from None
