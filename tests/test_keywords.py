"""Keyword arguments that functions of the package do not take."""

from __future__ import annotations

import pytest

import tokenenv
from tokenenv.errors import UnknownArgument, UserError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "name",
    [
        "evaluate",
        "bench",
        "compare",
        "compress",
        "show",
        "explore",
        "watch",
        "record",
        "train",
        "build_game",
    ],
)
def test_an_unknown_keyword(name: str) -> None:
    arguments = {"compress": ("digits_vit", "tome:r=4"), "build_game": (), "train": ("rl4evit",)}
    with pytest.raises(TypeError, match=r"mdoel.*; did you mean 'model'") as caught:
        getattr(tokenenv, name)(*arguments.get(name, ("tome:r=4",)), mdoel="digits_vit")
    assert isinstance(caught.value, UnknownArgument) and isinstance(caught.value, UserError)
    assert "\n" not in str(caught.value)
    if name not in ("train", "build_game"):
        assert f"{name}() has no argument 'mdoel': choose from " in str(caught.value)
        assert ", trust" in str(caught.value)


def test_an_unknown_keyword_beside_ready_rules() -> None:
    rules = tokenenv.TokenPrune((3,))
    with pytest.raises(UnknownArgument, match=r"unknown argument 'dvice'.* did you mean 'device'"):
        tokenenv.build_game(rules=rules, dvice="cpu")
    with pytest.raises(UserError, match="share=False goes with the name of rules"):
        tokenenv.build_game(rules=rules, share=False)
