"""Learners of the suite: built in, and of one's own."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from command_line import mistake
from suite_tasks import TINY, TINY_MERGE, elsewhere, kept, run  # noqa: F401

from agents.training import Run
from tokenenv.suite.learners import settings
from tokenenv.suite.results import read_result
from tokenenv.suite.tasks import register_task

REPOSITORY = Path(__file__).resolve().parents[2]


def test_ctrl_c_in_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def stopped(system: str, **options: Any) -> Run:
        asked.append(options)
        Path(options["out"], "checkpoint.safetensors").touch()
        return Run(options["out"], report={"stopped_early": True})

    monkeypatch.setattr("tokenenv.suite.learners.train", stopped)
    for _ in range(2):
        assert run("run tiny-prune-v0 --learner ippo --seeds 0") == 130
        assert "the same command goes on" in capsys.readouterr().err
    assert [options["resume"] for options in asked] == [False, True]
    assert asked[0]["centralised"] is False and not kept()


def test_a_trained_learner_keeps_the_budget_and_resumes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("run tiny-prune-v0 --learner mappo --seeds 3") == 0
    (folder,) = Path("suite/runs").glob("tiny-prune-v0-mappo-3-*")
    config = json.loads((folder / "config.json").read_text())
    assert config["updates"] * config["batch"] == TINY.budget
    assert config["seed"] == 3 and config["target_saving"] == pytest.approx(57)
    before = kept()["tiny-prune-v0-mappo-3"]
    # Stopped after training, while points were read: the run in its folder goes on.
    Path("suite/results/tiny-prune-v0/tiny-prune-v0-mappo-3.json").unlink()
    assert run("run tiny-prune-v0 --learner mappo --seeds 3") == 0
    assert kept()["tiny-prune-v0-mappo-3"]["points"] == before["points"]


def test_a_learner_of_your_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY))
    learner = "examples.suite_own_learner:learn"
    assert run(f"run tiny-prune-v0 --learner {learner} --seeds 0") == 0
    (found,) = kept().values()
    assert found["learner"] == learner and len(found["points"]) > 2


OWN = """
import functools
import agents
def none(task, seed): return None
def nan(task, seed): return [float("nan")]
def many(task, seed): return [agents.parse_policy("random:keep=0.5", 12)] * 11
def empty(task, seed): return []
def merges(task, seed): return agents.parse_policy("tome:r=3", 12)
def elsewhere(task, seed): return agents.parse_policy("random:keep=0.5,blocks=1", 12)
def greedy(task, seed):
    game = task.game(batch_size=200)
    for _ in range(2):
        game.reset()
class Broken:
    rules = agents.parse_policy("norm:keep=0.5", 12).rules
    def act(self, observation): return observation.active.long()
    def macs(self, agents, removed): return agents * float("nan")
def broken(task, seed): return Broken()
number = 5
def ruleless(task, seed):
    policy = Broken()
    policy.rules = None
    return policy
def spoils(task, seed):
    next(task.backbone.model.parameters()).data.mul_(0.5)
    return agents.parse_policy("norm:keep=0.5", 12)
def half(task, seed):
    task.game(batch_size=4, dtype="bfloat16").reset()
    return keeps(0.5, task, seed)
def keeps(keep, task, seed): return agents.parse_policy(f"norm:keep={keep}", 12)
def peeks(task, seed):
    len(task.test)
    return keeps(0.5, task, seed)
def peeks_and_goes_on(task, seed):
    try:
        task.test.batch(0)
    except Exception:
        return keeps(0.5, task, seed)
def draws(task, seed): return agents.parse_policy("random:keep=0.5", 12)
partial = functools.partial(keeps, 0.5)
"""


@pytest.fixture
def own_learners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules to import from the current folder."""
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    monkeypatch.delitem(__import__("sys").modules, "own_learners", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("own_learners.py").write_text(OWN)
    Path("slip.py").write_text("def learn(:")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("none", "returned None: return a policy"),
        ("nan", "returned nan: return a policy"),
        ("many", "returned 11 policies: return 1 to 10"),
        ("empty", "returned 0 policies: return 1 to 10"),
        ("merges", "under LayerMerge"),
        ("elsewhere", "at blocks 1 does not play"),
        ("greedy", "plays 400 episodes of 'tiny-prune-v0', whose budget is 256"),
        ("broken", "not finite or negative"),
        ("ruleless", "return a policy, with rules, act and macs"),
        ("peeks", "looks at the test images of 'tiny-prune-v0'"),
        ("peeks_and_goes_on", "looks at the test images of 'tiny-prune-v0'"),
        ("draws", "does not act alike in different executions"),
        ("spoils", "changed the weights of 'digits_vit', which stay frozen"),
        ("missing", "can't be imported"),
        ("number", "'number' is 5, no function"),
    ],
)
def test_mistakes_of_a_learner_of_your_own(
    function: str, words: str, capfd: pytest.CaptureFixture[str], own_learners: None
) -> None:
    command = f"suite run tiny-prune-v0 --learner own_learners:{function} --seeds 0"
    assert words in mistake(command, capfd)


def test_a_learner_whose_library_is_missing(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    missing = ("benchmarl", "stable_baselines3")
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: None if name in missing else found(name, *rest),
    )
    command = "suite run tiny-prune-v0 --learner random --learner benchmarl:qmix --seeds 0"
    assert "needs benchmarl: pip install 'tokenenv[benchmarl]'" in mistake(command, capfd)
    assert not kept()  # before the first learner runs
    command = "suite run tiny-merge-v0 --learner sb3:ppo --seeds 0"
    assert "needs stable_baselines3: pip install 'tokenenv[sb3]'" in mistake(command, capfd)
    command = "suite run tiny-merge-v0 --learner benchmarl:mappo"
    assert "learner 'benchmarl:mappo'" in mistake(command, capfd)


def test_a_learner_that_is_no_plain_function(own_learners: None) -> None:
    for word in ("own_learners:partial", "own_learners.py:partial"):
        assert run(f"run tiny-prune-v0 --learner {word} --seeds 0") == 0
    one, other = kept().values()
    assert one["points"] == other["points"]
    # Another source is another learner.
    assert one["conditions"]["code"] == other["conditions"]["code"] != ""
    assert one["conditions"]["learnt_in"] == "float32"


def test_a_learner_of_your_own_may_play_in_half_precision(own_learners: None) -> None:
    for _ in range(2):  # the second time it is kept
        assert run("run tiny-prune-v0 --learner own_learners:half --seeds 0") == 0
    (found,) = kept().values()
    assert found["conditions"]["learnt_in"] == "bfloat16"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("run digits --learner random", "unknown task 'digits': choose from digits-prune-v0"),
        ("run digits-prune-v9 --learner random", "this one has 'digits-prune-v0'"),
        ("run tiny-prune-v0 --learner x", "unknown learner 'x': choose from random, heuristic"),
        ("run tiny-prune-v0 --learner no.such:f", "can't be imported"),
        ("run tiny-prune-v0 --learner :f", "'' is no module's name"),
        ("run tiny-prune-v0 --learner ..up:f", "'..up' is no module's name"),
        ("run tiny-prune-v0 --learner slip:learn", "invalid syntax (slip.py, line 1)"),
        ("run tiny-prune-v0 --learner dora", "choose from random, heuristic, untrained, ippo"),
        ("run tiny-merge-v0 --learner mappo", "choose from random, heuristic, untrained, dora"),
        ("run tiny-prune-v0 --learner dora-deit_tiny", "under LayerMerge"),
        (
            "run deit-tiny-prune-v0 --learner random",
            "give --data DIR to learn from and --test-data",
        ),
        ("run tiny-prune-v0 --learner random --data x", "leave --weights, --data and --test-data"),
        ("run tiny-prune-v0", "--learner"),
        ("run tiny-prune-v0 --learner random --seeds a", "no whole number"),
        ("score nowhere", "'nowhere' holds no results"),
        ("plot nowhere", "'nowhere' holds no results"),
        ("draw", "invalid choice"),
    ],
)
def test_mistakes(
    command: str, words: str, capfd: pytest.CaptureFixture[str], own_learners: None
) -> None:
    assert words in mistake(f"suite {command}", capfd)


def test_the_untrained_policy_plays_the_tasks_own_game() -> None:
    prune = dataclasses.replace(
        TINY_MERGE, name="tiny-layer-prune-v0", environment="tokenenv/LayerPrune-v0",
        rules="layer_prune", blocks=(1, 3, 5),
    )  # fmt: skip
    register_task(prune)
    assert settings(prune, "dora-prune").initial_budget == (15.0,)  # of 15, 23, 9 and 13
    for task in (TINY, TINY_MERGE, prune):
        assert run(f"run {task.name} --learner untrained --seeds 0") == 0
        assert len(kept(task)) == 1


def test_a_learner_may_train_in_half_precision(capfd: pytest.CaptureFixture[str]) -> None:
    command = "run tiny-prune-v0 --learner untrained --learner mappo --seeds 3 --dtype bfloat16"
    assert run(command) == 0
    found = kept()
    assert found["tiny-prune-v0-untrained-3"]["conditions"]["learnt_in"] == "float32"
    assert found["tiny-prune-v0-mappo-3"]["conditions"]["learnt_in"] == "bfloat16"
    (folder,) = Path("suite/runs").glob("tiny-prune-v0-mappo-3-*")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    again = "run tiny-prune-v0 --learner mappo --seeds 3"
    assert "was made with learnt_in=bfloat16 and now" in mistake(f"suite {again}", capfd)
    # What it says helps: the run of before is not gone on with.
    Path("suite/results/tiny-prune-v0/tiny-prune-v0-mappo-3.json").unlink()
    assert run(again) == 0 and len(list(Path("suite/runs").iterdir())) == 2
    assert kept()["tiny-prune-v0-mappo-3"]["conditions"]["learnt_in"] == "float32"
    # As it is: what it learnt in is in its folder.
    assert run(f"run tiny-prune-v0 --learner {folder} --out other") == 0
    (frozen,) = Path("other/results/tiny-prune-v0").iterdir()
    assert json.loads(frozen.read_text())["conditions"]["learnt_in"] == "bfloat16"
    (folder / "config.json").write_text("{")  # only the policy is needed
    assert run(f"run tiny-prune-v0 --learner {folder} --out third") == 0
    (frozen,) = Path("third/results/tiny-prune-v0").iterdir()
    assert json.loads(frozen.read_text())["conditions"]["learnt_in"] == "unknown"
    path = Path("suite/results/tiny-prune-v0/tiny-prune-v0-untrained-3.json")
    older = json.loads(path.read_text())
    del older["conditions"]["learnt_in"], older["sha256"]  # kept before there were any
    path.write_text(json.dumps(older))
    assert read_result(path).conditions["learnt_in"] == "float32"
