"""Tasks of a user's own, registered beside the suite's."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from suite_tasks import TINY, elsewhere, run  # noqa: F401

from tokenenv.errors import UserError
from tokenenv.suite import TASKS, find_task, register_task


def test_a_registered_task_is_found_and_listed(capsys: pytest.CaptureFixture[str]) -> None:
    own = dataclasses.replace(TINY, name="own-v3", description="one of my own")
    assert register_task(own) is own and find_task("own-v3") is own
    assert register_task(dataclasses.replace(own)) is own and TASKS.count(own) == 1
    assert run("list") == 0
    assert "one of my own; references of no learners" in capsys.readouterr().out
    with pytest.raises(UserError, match="this one has 'own-v3'"):
        find_task("own-v2")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"budget": 7}, "'tiny-prune-v0' exists already with other settings: raise its version"),
        ({"name": "mine"}, "'mine' has no version: end its name with -v0"),
        ({"name": "m-v0", "low": 0.7, "high": 0.6}, "has the range 0.7 to 0.6"),
        ({"name": "m-v0", "grid": ()}, "has a grid of 0 values: give 1 to 10"),
        ({"name": "m-v0", "grid": (0.5,) * 11}, "has a grid of 11 values: give 1 to 10"),
    ],
)
def test_tasks_that_are_refused(changed: dict[str, Any], words: str) -> None:
    known = list(TASKS)
    with pytest.raises(UserError, match=words):
        register_task(dataclasses.replace(TINY, **changed))
    assert known == TASKS


def test_an_unknown_task_says_how_to_add_one() -> None:
    with pytest.raises(UserError, match=r"yours needs tokenenv.suite.register_task"):
        find_task("gone")
