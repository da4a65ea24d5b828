"""Episodes in Minari's form: the recovered environment gives what was recorded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import agents
import tokenenv
from agents.policies.actor import ActorPolicy, Widths
from tokenenv import UserError, build_game
from tokenenv.cli.main import main

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    (tmp_path / "datasets").mkdir()
    pytest.importorskip("h5py")
    return pytest.importorskip("minari")


def learned(folder: Path) -> str:
    """An untrained policy that reads two features, on disk."""
    game = build_game(features=("norm", "progress"), share=False, max_cycles=2)
    torch.manual_seed(0)
    widths = Widths(game.agent_dim, game.shared_dim, game.state_dim)
    policy = ActorPolicy(game.rules, widths, hidden=(8,), initial=0.6)
    policy.lean_on(game.rules.layout(game.backbone)["norm"], 4.0)
    folder.mkdir()
    policy.save(folder / agents.policies.POLICY)
    return str(folder)


def check_replay(data: Any, count: int) -> None:
    env = data.recover_environment()
    assert data.total_episodes == count
    lengths = set()
    for episode in data.iterate_episodes():
        (about,) = data.storage.get_episode_metadata([episode.id])
        observation, info = env.reset(seed=int(about["seed"]))
        assert np.array_equal(observation, episode.observations[0])
        for t, action in enumerate(episode.actions):
            assert env.action_space.contains(action)
            observation, reward, over, cut, info = env.step(action)
            assert np.array_equal(observation, episode.observations[t + 1])
            assert reward == episode.rewards[t]
            assert (over, cut) == (episode.terminations[t], episode.truncations[t])
            for key, value in info.items():
                assert np.array_equal(value, episode.infos[key][t + 1]), key
        assert over
        lengths.add(tuple(episode.infos["tokens_left"]))
    assert len(lengths) > 1 or count == 1


@pytest.mark.parametrize(
    ("what", "id"),
    [
        ("merge-above:similarity=0.9,blocks=2/5/8", "LayerMerge-v0"),
        ("random:keep=0.4..0.9,blocks=3/6", "TokenPrune-v0"),
        ("random:keep=0.4..0.9,blocks=0/6", "TokenPrune-v0"),
        ("learned", "TokenPrune-v0"),
    ],
)
def test_what_is_recorded_replays_equal(
    what: str, id: str, library: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = what == "learned"
    what = learned(tmp_path / "run") if own else what
    words = ["record", what, "--minari", "tokenenv/a-v0", "--episodes", "4", "--seed", "7"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert f"tokenenv/{id}: 4 episodes" in said and str(tmp_path / "datasets") in said
    data = library.load_dataset("tokenenv/a-v0")
    assert data.env_spec.id == f"tokenenv/{id}"
    assert (data.recover_environment().unwrapped.observation_space.shape[-1] == 4) == own
    check_replay(data, 4)
    assert main(words) == 2
    assert "the data set 'tokenenv/a-v0' exists: give another" in capsys.readouterr().err


def test_the_policy_acts_as_it_does_when_it_is_evaluated(library: Any) -> None:
    made = tokenenv.record("tome:r=12,blocks=2/5/8", minari="tome-v0", episodes=3, split="test")
    data = library.load_dataset("tome-v0")
    left = [episode.infos["tokens_left"].tolist() for episode in data.iterate_episodes()]
    assert left == [[64, 52, 40, 28]] * 3
    assert (made.steps, made.episodes, made.environment) == (9, 3, "tokenenv/LayerMerge-v0")


@pytest.mark.parametrize(
    ("what", "name", "reason"),
    [
        ("evit:keep=0.7", "a-v0", "acts in no game"),
        ("tome:r=8", "a b/c", "is no name of a data set"),
    ],
)
def test_what_cannot_be_recorded_says_why(
    what: str, name: str, reason: str, library: Any, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=reason):
        tokenenv.record(what, minari=name, episodes=1)
    assert not list((tmp_path / "datasets").iterdir())


def test_a_broken_recording_leaves_no_dataset(
    library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minari.dataset.minari_storage import MinariStorage

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(MinariStorage, "update_metadata", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenenv.record("tome:r=8", minari="tokenenv/a-v0", episodes=1)
    monkeypatch.undo()
    assert not list((tmp_path / "datasets").rglob("*.hdf5"))


def test_without_minari_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "minari", None)
    assert main(["record", "tome:r=8", "--minari", "a-v0"]) == 2
    said = capsys.readouterr().err
    assert said == "tokenenv: Minari is not installed: pip install 'tokenenv[minari]'\n"
