"""What a comparison finds saved: rows and times that are its own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

from tokenenv.errors import UserError
from tokenenv.measure.evaluation import Evaluation
from tokenenv.measure.speed import DENSE, Speed
from tokenenv.measure.state import State

IMAGES = 5


def row(**changes: Any) -> Evaluation:
    """Three of five images; the others could not be read."""
    whole = torch.tensor([0, 1, 2])
    values: dict[str, Any] = {
        "labels": whole, "dense": whole, "reduced": whole, "losses": torch.rand(3),
        "macs": torch.full((3,), 1e6, dtype=torch.float64), "lengths": torch.ones(3, 2).long(),
        "executed": torch.full((3,), 9e5, dtype=torch.float64), "divergence": torch.rand(3),
        "dense_macs": 2e6, "dense_executed": 1.8e6, "index": torch.tensor([0, 2, 4]),
        "seconds": 0.5, "dense_seconds": None,
    }  # fmt: skip
    return Evaluation(**values | changes)


def speed(what: str, batch: int = 4) -> Speed:
    plain: dict[Any, Any] = {float: 1.0, int: 1, bool: False, str: "float32"}
    values = {name: plain.get(kind) for name, kind in get_type_hints(Speed).items()}
    return Speed(**values | {"what": what, "batch": batch})  # type: ignore[arg-type]


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State(tmp_path, {"images": IMAGES})


def test_a_folder_of_a_process_that_was_killed_at_once(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / ".77-ab.part").touch()
    State(tmp_path, {"images": IMAGES})
    assert (tmp_path / "state" / "conditions.json").is_file()
    for other in ("notes.txt", "state/notes.txt"):
        place = tmp_path / other.replace("/", "-")
        (place / "state").mkdir(parents=True)
        (place / other).touch()
        with pytest.raises(UserError, match="holds other files than a comparison's"):
            State(place, {"images": IMAGES})


def test_a_row_is_read_as_it_was_saved(state: State) -> None:
    state.save("key", saved := row())
    found = state.load("key")
    assert found is not None
    for field in dataclasses.fields(Evaluation):
        one, other = getattr(found, field.name), getattr(saved, field.name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"index": torch.tensor([0, 2, 5])}, "'index' does not rise within the images"),
        ({"index": torch.tensor([-1, 2, 4])}, "'index' does not rise within the images"),
        ({"index": torch.tensor([0, 2, 2])}, "'index' does not rise within the images"),
        ({"index": torch.tensor([0.0, 2.0, 4.0])}, "'index' holds torch.float32"),
        ({"labels": torch.tensor([True, True, False])}, "'labels' holds torch.bool"),
        ({"losses": torch.tensor([1, 2, 3])}, "'losses' holds torch.int64"),
        ({"macs": torch.tensor([1.0, 2.0, -3.0])}, "'macs' is out of range"),
        ({"macs": torch.tensor([1.0, 2.0, 1e30])}, "'macs' is out of range"),
        ({"dense_macs": 0.0}, "'dense_macs' is 0.0"),
        ({"seconds": -1.0}, "'seconds' is -1.0"),
    ],
)
def test_rows_that_no_comparison_saved(changes: dict[str, Any], words: str, state: State) -> None:
    state.save("key", row(**changes))
    with pytest.raises(UserError, match=words):
        state.load("key")


@pytest.mark.parametrize("rows", [0, 6])
def test_as_many_rows_as_images_at_most(rows: int, state: State) -> None:
    values = {name: value[:1].expand(rows, *value.shape[1:]) for name, value in vars(row()).items()
              if isinstance(value, torch.Tensor)}  # fmt: skip
    state.save("key", row(**values | {"index": torch.arange(rows)}))
    with pytest.raises(UserError, match=f"{rows} rows, and there are 5 images"):
        state.load("key")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([speed("a"), speed("b")], "2 rows, and 3 methods were timed"),
        ([speed(DENSE), speed("a")], "2 rows, and 3 methods were timed"),
        ([speed(DENSE), speed("a"), speed("a")], "3 rows, and 3 methods were timed"),
        ([speed(DENSE), speed("a"), speed("b", batch=2)], "a row is of batch 2"),
        (
            [speed(DENSE), speed("a"), dataclasses.replace(speed("b"), gmacs=-1.0)],
            "'gmacs' is -1.0",
        ),
    ],
)
def test_times_that_no_comparison_saved(rows: list[Speed], words: str, state: State) -> None:
    asked = {"rows": ["key a", "key b"]}
    good = [speed(DENSE), speed("a"), speed("b")]
    state.save_speeds(4, asked, good)
    assert state.load_speeds(4, asked) == good
    assert state.load_speeds(4, asked | {"rounds": 3}) is None
    state.save_speeds(4, asked, rows)
    with pytest.raises(UserError, match=words):
        state.load_speeds(4, asked)
    (file,) = state.folder.glob("batch-4.json")
    assert json.loads(file.read_text())["asked"] == asked
