"""The arguments tables of the Gymnasium environments' pages, against the code."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from typing import Any

import pytest

from tokenenv.envs.gym_base import GameEnv
from tokenenv.envs.layer_merge_gym import LayerMergeEnv
from tokenenv.envs.layer_prune_gym import LayerPruneEnv
from tokenenv.envs.token_prune_gym import TokenPruneEnv
from tokenenv.game.build import build_game
from tokenenv.game.rules import RULES

ROW = re.compile(r"^\| `(\w+)` \| .+? \| (.+?) \| .+ \|$")
FIXED = {"rules", "batch_size", "repeats", "privileged", "settings"}
"""Arguments of build_game that a Gymnasium environment does not take."""


def table(env: type[GameEnv]) -> list[tuple[str, Any]]:
    """Name and default of each row of a page's arguments table."""
    page = inspect.getdoc(env)
    assert page is not None
    lines = page.split("| Parameter | Type | Default | Description |")[1].splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        found = ROW.match(line)
        assert found is not None, line
        rows.append((found[1], default(found[2])))
    return rows


def default(cell: str) -> Any:
    """The value of a Default cell: a literal, or the names of a tuple without quotes."""
    if cell.startswith(("`", "(")):
        return ast.literal_eval(cell.strip("`"))
    return tuple(cell.split(", "))


def arguments(env: type[GameEnv]) -> dict[str, Any]:
    """The arguments that an environment takes, with the defaults that hold there."""
    rules = RULES[env.rules]
    game = inspect.signature(build_game).parameters
    taken = {name: p.default for name, p in game.items() if name not in FIXED}
    taken |= {f.name: f.default for f in dataclasses.fields(rules) if f.name != "blocks"}  # type: ignore[arg-type]
    taken |= rules.face_defaults
    taken["reward"] = rules.default_reward
    taken["render_mode"] = inspect.signature(env).parameters["render_mode"].default
    return taken


@pytest.mark.parametrize("env", [TokenPruneEnv, LayerMergeEnv, LayerPruneEnv])
def test_the_arguments_table_agrees_with_the_code(env: type[GameEnv]) -> None:
    rows = table(env)
    assert len({name for name, _ in rows}) == len(rows)
    assert dict(rows) == arguments(env)
