"""Training from Python: the command line's run, its mistakes, and what it gives back."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import shutil
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import QUICK, mistake

import tokenenv
from agents.learners.mappo import MAPPO
from agents.policies.actor import ActorPolicy
from agents.systems import SYSTEMS, PolicyConfig, find_system, register_system
from agents.systems.settings import RESERVED, read_settings
from agents.training import Run, train
from agents.training.trainer import CHECKPOINT
from tokenenv.cli.main import main
from tokenenv.errors import UserError
from tokenenv.own import load_own
from tokenenv.storage import read_tensors, unflatten_state

pytestmark = pytest.mark.usefixtures("elsewhere", "one_thread")

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "extend" / "own_system.py"
TINY: dict[str, Any] = {
    "images": 60,
    "updates": 3,
    "evaluate_every": 1,
    "batch": 8,
    "hidden": [8],
    "epochs": 1,
    "minibatches": 1,
    "calibrate": 2,
    "blocks": (1, 4),
}
"""What QUICK of the command line's tests asks for."""


def policy_bytes(folder: Path | str) -> bytes:
    return Path(folder, "policy.safetensors").read_bytes()


def settled(report: dict[str, Any]) -> dict[str, Any]:
    """A report without what a clock measured."""
    times = {"training_seconds", "images_per_s", "images_per_s_dense"}
    return {key: value for key, value in report.items() if key not in times}


def test_it_is_the_command_lines_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK.split(), "--out", "command"]) == 0
    said = capsys.readouterr().out
    run = tokenenv.train("rl4evit", out=Path("python"), **TINY)
    assert policy_bytes("python") == policy_bytes("command")
    assert Run.open("command").config == run.config
    assert settled(Run.open("command").report) == settled(run.report)
    assert said.splitlines()[0] == capsys.readouterr().out.splitlines()[0]
    # Words do for values, as on the command line.
    worded = {**TINY, "hidden": "8", "blocks": "1/4", "updates": "3", "calibrate": 2}
    train("rl4evit", out="words", **worded)
    assert policy_bytes("words") == policy_bytes("command")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train("rl4evit", out=tmp_path_factory.mktemp("trained") / "run", **TINY)


def test_a_run_is_opened_as_it_was_given(trained: Run) -> None:
    again = Run.open(str(trained.folder))
    assert again.to_dict() == trained.to_dict()
    assert json.loads(json.dumps(again.to_dict())) == trained.to_dict()
    assert again.to_dict().keys() == {"folder", "config", "report", "stopped"}
    assert not again.stopped and again.config["updates"] == again.report["updates"] == 3
    assert isinstance(again.policy, ActorPolicy) and again.policy is again.policy
    assert again.policy.threshold == again.report["threshold"]


def test_how_a_run_is_shown(trained: Run) -> None:
    top1 = f"{trained.report['top1']:.2f} %"
    assert "\n" not in repr(trained)
    for shown in (repr(trained), trained._repr_html_()):
        for words in ("rl4evit", "digits_vit", str(trained.folder), top1, "GMACs saved"):
            assert words in shown
    assert trained._repr_html_().count("<tr>") == 4
    odd = dataclasses.replace(trained, folder=Path("<b>"))
    assert "<b>" not in odd._repr_html_()
    assert repr(Run(Path("x"))) == "<Run x: ? on ?>"  # as other processes than the first have it


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("report.json", None, "holds no finished run, there is no report.json"),
        ("config.json", None, "holds no finished run, there is no config.json"),
        ("report.json", "{", "cannot read 'damaged/report.json'"),
        ("report.json", "[]", "'damaged/report.json' is not a run's"),
        ("report.json", '{"top1": 5}', "'damaged/report.json' doesn't say top1_dense, gmacs"),
        ("config.json", "{}", "'damaged/config.json' doesn't say system, model, seed"),
    ],
)
def test_a_damaged_run(name: str, content: str | None, words: str, trained: Run) -> None:
    shutil.copytree(trained.folder, "damaged")
    Path("damaged", name).unlink()
    if content is not None:
        Path("damaged", name).write_text(content)
    with pytest.raises(UserError) as caught:
        Run.open("damaged")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_setting() -> None:
    with pytest.raises(TypeError, match="updats=3: unknown key; choose from") as caught:
        train("rl4evit", updats=3)
    assert isinstance(caught.value, UserError)
    assert str(caught.value).endswith("did you mean 'updates'?")
    assert "target_saving" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"updates": 1.5}, "updates=1.5: updates takes a whole number"),
        ({"updates": True}, "updates=true: updates takes a whole number"),
        ({"updates": 0}, "updates=0 doesn't do: it must be at least 1"),
        ({"share": 1}, "share=1: share takes true or false"),
        ({"lr": "much"}, "lr=much: lr takes a number"),
        ({"lr": None}, "lr=None: lr takes a number"),
        ({"hidden": ["a", 8]}, "hidden=a/8: hidden takes one value or several"),
        ({"hidden": []}, "one or more widths"),
        ({"reward": 7}, "reward=7: reward takes cooperative or alpha_beta or keep_target"),
        ({"reward": "gold"}, "reward=gold: reward takes"),
        ({"images": 0}, "images=0 is no whole number from 1"),
        ({"seed": -1}, "seed=-1 is no whole number from 0"),
        ({"seed": 0.5}, "seed=0.5 is no whole number from 0"),
        ({"seed": 2**32}, "to 4294967295"),
        ({"model": "nonsense", "data": "."}, "unknown model 'nonsense'"),
        ({"dtype": "int8"}, "int8"),
        ({"resume": True}, "--resume needs --out"),
    ],
)
def test_wrong_values(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        train("rl4evit", **options)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not list(Path.cwd().iterdir())


def test_values_as_the_fields_want_them() -> None:
    read = read_settings(
        find_system("dora-prune").config,
        {"lr": 1, "lean": [1, 2], "blocks": 3, "features": ["keys"], "closed_loop": False},
    )
    assert read == {
        "lr": 1.0,
        "lean": (1.0, 2.0),
        "blocks": (3,),
        "features": ("keys",),
        "closed_loop": False,
    }
    assert isinstance(read["lr"], float) and isinstance(read["lean"][0], float)
    with pytest.raises(UserError, match="lean takes 2 values"):
        read_settings(find_system("dora-prune").config, {"lean": [1, 2, 3]})


def test_ctrl_c_and_going_on(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train("rl4evit", out="whole", **TINY)
    update, calls = MAPPO.update, iter(range(1, 99))

    def interrupted(self: MAPPO) -> dict[str, float]:
        if next(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return update(self)

    with monkeypatch.context() as patch:
        patch.setattr(MAPPO, "update", interrupted)
        broken = train("rl4evit", out="broken", **TINY)
    assert broken.stopped and Run.open("broken").stopped and not whole.stopped
    assert broken.report["updates"] == 2 and "stopped after 2 updates" in repr(broken)
    with pytest.raises(UserError, match="started with updates=3"):
        train("rl4evit", out="broken", resume=True, **TINY | {"updates": 4})
    torch.manual_seed(99)  # whatever else drew numbers in between
    done = train("rl4evit", out="broken", resume=True, **TINY)
    assert not done.stopped and policy_bytes("broken") == policy_bytes("whole")


def test_models_of_their_own() -> None:
    options = {"images": 40, "updates": 1, "batch": 4, "held_back": 0.2}
    assert train("ltm", out="ltm", **options).policy is None
    assert train("evit", out="evit", **options).policy.blocks == (3, 6, 9)
    assert Run.open("evit").report["frozen"] is False


# Systems of one's own


def test_a_system_in_a_file(capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copy(EXAMPLE, "mine.py")
    words = "--images 60 --set updates=2 --set evaluate_every=1 --set batch=8 --set calibrate=1"
    assert main(["train", "mine.py:LikelihoodConfig", *words.split(), "--out", "command"]) == 0
    options = {"images": 60, "updates": 2, "evaluate_every": 1, "batch": 8, "calibrate": 1}
    run = train("mine.py:LikelihoodConfig", **options)
    assert run.folder == Path("runs/mine-py-LikelihoodConfig-0")
    assert policy_bytes(run.folder) == policy_bytes("command")
    assert run.config["system"] == "mine.py:LikelihoodConfig"
    assert run.config["origin"]["file"] == str(Path.cwd() / "mine.py")
    assert run.config["origin"]["sha256"].startswith(run.config["code"])
    # Changed since, it is another system: the run is not gone on with.
    Path("mine.py").write_text(EXAMPLE.read_text() + "\n")
    command = f"train mine.py:LikelihoodConfig {words} --out command --resume"
    assert "with code=" in mistake(command, capfd)
    assert main(["train", "mine.py:LikelihoodConfig", "--list-settings"]) == 0
    listed = capfd.readouterr().out
    assert "price=0.0001" in listed and "updates: rollouts of" in listed


def test_the_price_of_an_own_reward_follows() -> None:
    spec = importlib.util.spec_from_file_location("own_system", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["own_system"] = module
    try:
        spec.loader.exec_module(module)
        run = module.main(updates=4, batch=16, images=100, out="run")
    finally:
        del sys.modules["own_system"]
    tensors, saved = read_tensors(run.folder / CHECKPOINT)
    (order,) = unflatten_state(saved["state"], tensors)["orders"]
    assert run.report["updates"] == 4 and run.config["price"] == 1e-4
    assert order["price"] not in (None, run.config["price"])
    assert run.policy.rules.blocks == (3, 6, 9)


def test_the_rules_of_an_own_system() -> None:
    rules = load_own(f"{EXAMPLE}:LeastPrune").object((3, 6), features=("cls_attention",))
    game = tokenenv.build_game(rules=rules, batch_size=2)
    game.reset()
    game.step(torch.tensor([[0], [1]]).expand(2, 64))  # all prune, all keep
    assert game.counts[-1].tolist() == [8, 64]


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("rl4evi", "unknown system 'rl4evi': choose from rl4evit, dora"),
        ("zzz", "unknown system 'zzz': choose from rl4evit, dora, dora-prune, mstm"),
        ("gone.py:Config", "there is no file 'gone.py'"),
        ("json:dumps", "'dumps' is no class of settings: derive it from agents.systems"),
        ("pathlib:Path", "'Path' is no class of settings"),
    ],
)
def test_systems_that_are_none(word: str, words: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert words in mistake(f"train {word}", capfd)
    with pytest.raises(UserError) as caught:
        train(word)
    assert words in str(caught.value)


@dataclass(frozen=True)
class Plain(PolicyConfig):
    """With defaults of PolicyConfig alone."""


def test_registered_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agents.systems.registry.SYSTEMS", dict(SYSTEMS))
    assert register_system("plain", "one line")(Plain) is Plain
    found = find_system("plain")
    assert (found.config, found.summary, found.origin) == (Plain, "one line", {})
    register_system("plain")(Plain)  # a notebook's cell may run again
    with pytest.raises(UserError, match="system 'dora' exists already"):
        register_system("dora")(Plain)
    assert Plain.for_large_digits() == Plain.for_digits() == Plain()


def test_classes_that_cannot_be_trained() -> None:
    for name, kind, default, words in (
        ("seed", int, 0, "'seed' is an argument of train"),
        ("many", dict, field(default_factory=dict), "'many' has no default"),
        ("some", complex, 1j, "'some' must be a whole number, a number"),
    ):
        made = dataclasses.make_dataclass(
            "Bad", [(name, kind, default)], bases=(PolicyConfig,), frozen=True
        )
        with pytest.raises(UserError, match=words):
            register_system("bad")(made)
    assert "bad" not in SYSTEMS

    @dataclass(frozen=True)
    class Unknown(PolicyConfig):
        far: Elsewhere = 3  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(UserError, match="Unknown: a type of its settings can't be found"):
        register_system("bad")(Unknown)


def test_settings_are_no_arguments_of_train() -> None:
    parameters = inspect.signature(train).parameters.values()
    named = [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
    assert named == list(RESERVED)
