"""Animations of a method's decisions: frames, pixels and numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tokenenv
from tokenenv.game import render
from tokenenv.game.animation import Panel, draw_frame, save_gif
from tokenenv.measure.episodes import Recorded, Step
from tokenenv.measure.watching import Seen, frames, reward_line

GRID = (4, 4)


def panel(owners: np.ndarray, *, merging: bool = False) -> Panel:
    pixels = np.full((8, 8, 3), 250, np.uint8)
    guesses = [("7", 0.9), ("a name far too long for any panel" * 3, 0.1)]
    return Panel(("head",), pixels, owners, merging, ("foot",), (("dense model", guesses),))


@pytest.mark.parametrize("what", ["tome:r=8,blocks=2/5", "random:keep=0.5,blocks=2/5"])
def test_a_gif_has_a_frame_per_decision_and_one_before(what: str, tmp_path: Path) -> None:
    found = tokenenv.watch(what, index=[3, 5])
    assert [len(frames) for frames in found.episodes] == [3, 3]
    found.save(tmp_path / "episode.gif")
    with Image.open(tmp_path / "episode.gif") as image:
        assert (image.format, image.n_frames) == ("GIF", 6)
        shown = found.episodes[1][2]
        image.seek(5)
        assert image.size == shown.shape[1::-1]
        # A palette of 256 colours, not another picture.
        assert np.abs(np.asarray(image.convert("RGB"), int) - shown).mean() < 3


def test_pruned_patches_are_darker_and_the_others_unchanged() -> None:
    owners = np.arange(16)
    owners[:4] = -1  # the first row of patches
    whole, pruned = (draw_frame([panel(o)], GRID).astype(int) for o in (np.arange(16), owners))
    changed = np.argwhere((whole != pruned).any(2))
    (top, left), (bottom, right) = changed.min(0), changed.max(0)
    assert (bottom - top + 1, right - left + 1) == (192 // 4, 192)
    assert (pruned[top : bottom + 1, left : right + 1] < 250).all()


def test_merged_patches_are_one_area_shaded_by_their_number() -> None:
    pixels = np.zeros((192, 192, 3), np.uint8)
    pixels[:48, :48], pixels[:48, 48:96] = 100, 200
    owners = np.arange(16)
    owners[1] = 0
    drawn = render.reduced(pixels, owners, GRID, merging=True)
    # Two of sixteen patches: a quarter of the strongest tint over their mean colour, which is 150.
    weight = render._STRONGEST / 4
    expected = (1 - weight) * 150 + weight * render._TINT
    assert np.abs(drawn[1:47, 1:95] - expected).max() < 1.01
    assert (drawn[48, :96] == render._EDGE).all()
    assert (drawn[96] == 0).all()  # no line between tokens of one patch
    pixels[:] = 0
    owners[2:8] = 0  # eight of sixteen
    larger = render.reduced(pixels, owners, GRID, merging=True)
    assert np.abs(larger[20, 20] - 3 * weight * render._TINT).max() < 1.01


def test_the_reward_so_far_and_what_agents_said() -> None:
    def step(block: int | None, reward: list[float] | None, chance: list[float] | None) -> Step:
        def one(values: list[float] | None) -> np.ndarray | None:
            return None if values is None else np.array([values], np.float32)

        nothing = np.zeros((1, 4))
        return Step(
            block, np.arange(4)[None], np.array([4]), np.array([1.0]), nothing, one(chance),
            one(reward),
        )  # fmt: skip

    nobody = float("nan")
    steps = [
        step(None, None, None),
        step(1, [1.0, 2.0, nobody, nobody], [0.1, 0.9, nobody, nobody]),
        step(4, [0.5, 0.5, 0.5, 0.5], [0.3, nobody, nobody, nobody]),
    ]
    method = Recorded((2, 2), True, False, 2.0, "dora", steps)
    lines = [reward_line(method, each, 0) for each in steps]
    assert lines == [f"reward so far: {total} (dora)" for total in ("0.000", "1.500", "2.000")]
    pixels = [np.zeros((8, 8, 3), np.uint8)]
    seen = Seen([["image"]], pixels, np.full((1, 3), 1 / 3), str, {"a": method})
    assert np.isnan(seen.panel(0, "a", None).chance).all()
    np.testing.assert_array_equal(seen.panel(0, "a", 4).chance, steps[2].chance[0])
    assert len({frame.shape for frame in frames(seen)[0]}) == 1
    silent = replace(method, steps=[replace(each, chance=None) for each in steps])
    assert replace(seen, methods={"a": silent}).panel(0, "a", 4).chance is None


def test_long_names_stay_in_their_panel() -> None:
    one = draw_frame([panel(np.arange(16))], GRID)
    two = draw_frame([panel(np.arange(16))] * 2, GRID)
    width = one.shape[1]
    assert (one[:, -8:] == 255).all()  # nothing reaches the margin
    assert np.array_equal(two[:, : width - 8], one[:, :-8])


@pytest.mark.parametrize(
    ("index", "words"),
    [([600], "index=600 is outside.*from 0 to 599"), ([], "names no image"), ([-1], "index")],
)
def test_positions_outside_the_data_are_refused(index: list[int], words: str) -> None:
    with pytest.raises(tokenenv.UserError, match=words):
        tokenenv.watch("tome:r=8", index=index)


def test_other_suffixes_are_refused(tmp_path: Path) -> None:
    frame = draw_frame([panel(np.arange(16))], GRID)
    with pytest.raises(tokenenv.UserError, match=r"does not end with \.gif"):
        save_gif(tmp_path / "episode.mp4", [[frame]])
    assert not list(tmp_path.iterdir())
