"""What the environments show: frames, text and saved pictures."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers import PATCHES, backbone, choices, small, source

from agents.policies.words import parse_policy
from tokenenv.data.pixels import Preprocess
from tokenenv.envs import drawing
from tokenenv.envs.token_prune_gym import TokenPruneEnv
from tokenenv.game import render
from tokenenv.measure import token_pictures as run_report

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


# Pictures -----------------------------------------------------------------------------------------
def test_frames_of_an_episode_have_one_size() -> None:
    game = TokenPruneEnv(render_mode="rgb_array", **small())
    game.reset(seed=0)
    frames = [game.render()]
    for action in choices(0, keep=0.3):
        over = game.step(action)[2]
        frames.append(game.render())
        if over:
            break
    assert len({frame.shape for frame in frames}) == 1
    assert all(not np.array_equal(a, b) for a, b in pairwise(frames))


def test_a_grey_image_of_a_model_with_three_means_stays_grey() -> None:
    model = timm.create_model("deit_tiny_patch16_224", depth=1, img_size=32, in_chans=1)
    assert len(model.pretrained_cfg["mean"]) == 3
    preprocess = Preprocess(model)
    pixels = torch.randint(0, 256, (1, 32, 32), dtype=torch.uint8)
    shown = render.to_pixels(preprocess.normalise([pixels])[0], model)
    assert shown.shape == (32, 32, 3)
    assert all(np.array_equal(shown[..., i], pixels[0].numpy()) for i in range(3))


def test_text_marks_pruned_tokens() -> None:
    game = TokenPruneEnv(render_mode="ansi", **small(max_cycles=1))
    game.reset(seed=0)
    assert render._PRUNED not in game.render()
    action = next(choices(0))
    game.step(action)
    text = game.render()
    assert text.count(render._PRUNED) == 2 * (action == 0).sum()
    assert f"{action.sum()}" in text.splitlines()[0]


def test_saved_pictures(tmp_path: Path) -> None:
    source = np.arange(2 * PATCHES).reshape(2, PATCHES) % PATCHES
    source[1, :20] = -1
    rows = [
        render.TokenRow(np.full((8, 8, 3), 9, np.uint8), source, "7", "7", predicted)
        for predicted in ("7", "1")
    ]
    render.save_token_pictures(tmp_path / "tokens.png", rows, (8, 8), (2, 4))
    assert (tmp_path / "tokens.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("what", "left"),
    [
        ("tome:r=8,blocks=2/5", [56, 48]),
        ("tome:r=0,blocks=2/5", [64, 64]),
        ("random:keep=0.5,blocks=2/5", [32, 16]),
        ("random:keep=1,blocks=2/5", [64, 64]),
    ],
)
def test_pictures_of_a_run_show_what_left(
    what: str, left: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    outlined = render.outlined
    monkeypatch.setattr(render, "outlined", lambda *a: drawn.append(a) or outlined(*a))
    rows: list[Any] = []
    monkeypatch.setattr(
        run_report,
        "save_token_pictures",
        lambda path, of, *a, **k: rows.extend(of) or render.save_token_pictures(path, of, *a, **k),
    )
    model = backbone()
    policy = parse_policy(what, model.depth)
    run_report.write_token_pictures(tmp_path / "tokens.png", model, policy, source(), 3)
    assert [[len(set(now[now >= 0])) for now in row.source] for row in rows] == [left] * 3
    # Merged tokens are outlined, with the patches that became one.
    assert len(drawn) == (6 if what.startswith("tome") else 0)
    assert (tmp_path / "tokens.png").stat().st_size > 1000


# Frames of environments ---------------------------------------------------------------------------
def test_a_frame_says_the_class_the_reward_and_what_the_models_see(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[Any] = []
    captioned = drawing.captioned
    monkeypatch.setattr(drawing, "captioned", lambda *a: told.append(a[1:]) or captioned(*a))
    env = TokenPruneEnv(render_mode="rgb_array", **small())
    env.reset(seed=0)
    game, total, over = env.game, 0.0, False
    env.render()
    for action in choices(0, keep=0.5):
        _, reward, over, _, _ = env.step(action)
        total += reward
        env.render()
        if over:
            break
    assert len(told) == 1 + env.max_cycles
    label = str(int(game.labels[0]))
    assert told[0][0] == f"true class: {label}   reward so far: 0.000"
    assert told[-1][0] == f"true class: {label}   reward so far: {total:.3f}"
    for logits, (title, classes) in zip(
        (game.dense[0], game.episode.logits[0]), told[-1][1], strict=True
    ):
        best = logits.softmax(0).topk(3)
        assert title in ("dense model", "with the tokens left")
        assert [name for name, _ in classes] == [str(i) for i in best.indices.tolist()]
        np.testing.assert_allclose([p for _, p in classes], best.values.numpy(), rtol=1e-5)
    dense = dict(told[0][1][1][1])  # nothing is removed yet
    for name, probability in told[0][1][0][1]:
        assert dense[name] == pytest.approx(probability, abs=1e-4)


def test_what_agents_said_is_a_colour() -> None:
    pixels = np.full((192, 192, 3), 100, np.uint8)
    chance = np.full(16, np.nan, np.float32)
    chance[:3] = 0.0, 0.5, 1.0
    drawn = render.tinted(pixels, chance, (4, 4)).astype(float)
    weight = render._SAID
    for patch, colour in enumerate((render.BARS[0], (255, 255, 255), render.BARS[1])):
        expected = (1 - weight) * 100 + weight * np.array(colour)
        assert np.abs(drawn[20, 48 * patch + 20] - expected).max() < 1
    assert (drawn[:, 144:] == 100).all() and (drawn[48:] == 100).all()


def test_human_mode_shows_a_window_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[Any] = []

    class Fake:
        def __init__(self, title: str) -> None:
            assert title == "tokenenv"

        def show(self, frame: Any) -> None:
            shown.append(frame)

    monkeypatch.setattr(drawing, "Window", Fake)
    env = TokenPruneEnv(render_mode="human", **small(max_cycles=1))
    env.reset(seed=0)
    env.step(next(choices(0)))
    assert len(shown) == 2 and shown[0].shape == shown[1].shape
    assert not np.array_equal(*shown) and capsys.readouterr().out == ""


def test_without_a_display_human_mode_says_why_there_is_no_window(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    env = TokenPruneEnv(render_mode="human", **small(max_cycles=1))
    env.reset(seed=0)
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("no window (matplotlib draws with 'agg', which has no windows")
    assert lines[0].startswith("image")
    env.step(next(choices(0)))
    assert "no window" not in capsys.readouterr().out
