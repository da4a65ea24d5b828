"""Animations of a method's decisions: frames, pixels and numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import backbone, source
from PIL import Image

import tokenenv
from agents.policies.words import parse_policy
from tokenenv.game import render
from tokenenv.game.animation import Panel, draw_frame, save_gif
from tokenenv.game.cost import Cost
from tokenenv.game.episode import Episode
from tokenenv.game.policy import play
from tokenenv.measure import watching

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


def test_merged_patches_are_one_area_in_their_mean_colour() -> None:
    pixels = np.zeros((192, 192, 3), np.uint8)
    pixels[:48, :48], pixels[:48, 48:96] = 100, 200
    owners = np.arange(16)
    owners[1] = 0
    drawn = render.reduced(pixels, owners, GRID, merging=True)
    assert (drawn[1:47, 1:95] == 150).all()
    assert (drawn[48, :96] == render._EDGE).all()


def test_long_names_stay_in_their_panel() -> None:
    one = draw_frame([panel(np.arange(16))], GRID)
    two = draw_frame([panel(np.arange(16))] * 2, GRID)
    width = one.shape[1]
    assert (one[:, -8:] == 255).all()  # nothing reaches the margin
    assert np.array_equal(two[:, : width - 8], one[:, :-8])


@pytest.mark.parametrize("what", ["tome:r=8,blocks=2/5", "evit:keep=0.5,blocks=2/5"])
def test_savings_start_at_none_and_end_at_those_of_the_evaluation(what: str) -> None:
    model = backbone()
    method, images = parse_policy(what, model.depth), source().batch(torch.arange(3)).images
    cost = Cost(model)
    with torch.inference_mode():
        episode = Episode(model, method.reduction, images, execution="masked")
        saved = [watching._saved(episode, method, cost)]
        while not episode.done:
            episode.act(method.next_action(episode))
            saved.append(watching._saved(episode, method, cost))
    assert saved[0].abs().max() < 1e-9
    assert (saved[1] > 0).all() and (saved[2] > saved[1]).all()
    macs = cost.of(play(model, method, images), method)
    torch.testing.assert_close(saved[2], 100 * (1 - macs / cost.dense()))


def test_before_any_decision_the_classes_are_those_of_the_dense_model() -> None:
    model = backbone()
    method, images = parse_policy("tome:r=8,blocks=2/5", model.depth), torch.arange(3)
    batch = source().batch(images).images
    with torch.inference_mode():
        steps = watching._play(model, method, batch)
        dense, last = model(batch).softmax(1), play(model, method, batch).logits.softmax(1)
    for (_, _, _, guesses), expected in ((steps[0], dense), (steps[-1], last)):
        for row, probabilities in zip(guesses, expected, strict=True):
            values, labels = probabilities.topk(3)
            assert [name for name, _ in row] == [str(label) for label in labels.tolist()]
            assert [p for _, p in row] == pytest.approx(values.tolist(), abs=1e-5)


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
