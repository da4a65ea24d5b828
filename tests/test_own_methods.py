"""Methods of a user's own, in files and modules: in every command, saved, loaded, and refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from command_line import QUICK, evaluation, mistake
from own_methods import METHODS
from safetensors.torch import save_file

import agents
import tokenenv
from agents.policies import POLICIES
from agents.policies.words import parse_policy
from tokenenv.cli.main import main
from tokenenv.errors import UserError
from tokenenv.game.rules import RULES
from tokenenv.own import load_own
from tokenenv.reducers import REDUCERS, Reducer, register_reducer
from tokenenv.storage import read_tensors, write_tensors
from tokenenv.vit.digits import digits

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def written(elsewhere: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``methods.py`` and ``own_module.py`` in the current folder, and registries as they were."""
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    monkeypatch.setattr("sys.path", list(sys.path))
    known = [(registry, dict(registry)) for registry in (REDUCERS, POLICIES, RULES)]
    for name in ("methods.py", "own_module.py"):
        Path(name).write_text(METHODS)
    yield
    sys.modules.pop("own_module", None)
    for registry, before in known:
        registry.clear()
        registry.update(before)


KINDS = ("First:keep=0.5", "Left:keep=0.5", "make:keep=0.5", "ready", "Duck")


# In every command -------------------------------------------------------------------------------
@pytest.mark.parametrize("place", ["methods.py", "./methods.py", "own_module"])
@pytest.mark.parametrize("kind", KINDS)
def test_evaluate(place: str, kind: str) -> None:
    numbers = evaluation(f"{place}:{kind} --limit 30")
    assert numbers["gmacs"] < 0.8 * numbers["gmacs_dense"]
    found = tokenenv.evaluate(f"{place}:{kind}", limit=30)
    assert found.predictions() == numbers["predictions"]
    loaded = load_own(f"{place}:{kind.partition(':')[0]}").object
    if kind == "First:keep=0.5":
        made = loaded((3, 6, 9), 0.5)
    else:
        made = loaded if kind == "ready" else loaded(12) if kind[0] in "Lm" else loaded()
    assert tokenenv.evaluate(made, limit=30).predictions() == found.predictions()


@pytest.mark.parametrize("place", ["methods.py", "own_module"])
def test_bench(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    whats = [f"{place}:{kind}" for kind in KINDS]
    assert main(["bench", *whats, *["--batch", "2", "--rounds", "1", "--compile", "none"]]) == 0
    printed = capsys.readouterr().out
    assert all(what in printed for what in whats)
    speeds = tokenenv.bench(
        whats[:1], batch=[2], rounds=1, compile="none", smaller=False, dtype="float32"
    )
    assert [row.what for row in speeds.rows] == ["dense", whats[0]]
    assert speeds.rows[1].gmacs < 0.8 * speeds.rows[0].gmacs


def test_compare_and_its_sweeps() -> None:
    words = ["own_module:make:keep=0.4|0.6", "methods.py:First:keep=0.5|0.7", "methods.py:ready"]
    command = ["compare", *words, "--limit", "30", "--batch", "2", "--rounds", "1"]
    assert main(command) == 0
    rows = json.loads(Path("compare/table.json").read_text())["rows"]
    saved = {row["what"]: row["saved"] for row in rows}
    assert list(saved) == [
        "dense",
        "own_module:make:keep=0.4",
        "own_module:make:keep=0.6",
        "methods.py:First:keep=0.5",
        "methods.py:First:keep=0.7",
        "methods.py:ready",
    ]
    assert saved["own_module:make:keep=0.4"] > saved["methods.py:First:keep=0.5"] > 30
    # A file that has changed is another method: its rows are evaluated again, no others.
    changed = METHODS.replace("(self.keep * tokens", "(0.25 * self.keep * tokens")
    Path("methods.py").write_text(changed)
    assert main(command) == 0
    rows = json.loads(Path("compare/table.json").read_text())["rows"]
    now = {row["what"]: row["saved"] for row in rows}
    assert now["methods.py:First:keep=0.5"] > saved["methods.py:First:keep=0.5"] + 10
    assert now["own_module:make:keep=0.4"] == saved["own_module:make:keep=0.4"]


@pytest.mark.parametrize("kind", ["First:keep=0.5", "Left:keep=0.5", "make:keep=0.5", "ready"])
@pytest.mark.parametrize("place", ["methods.py", "own_module"])
def test_compress(place: str, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", f"{place}:{kind}", "--out", "fast"]) == 0
    images = (digits("test")[0][:20].float() / 255 - 0.5) / 0.5
    expected = tokenenv.compress(None, f"{place}:{kind}")(images)
    loaded = tokenenv.load_compressed("fast", trust=True)
    assert torch.equal(loaded(images), expected)
    assert evaluation("fast --limit 20 --trust")["gmacs"] > 0
    assert "give trust=True (--trust)" in mistake("evaluate fast --limit 20", capfd)


def test_words_for_a_function() -> None:
    method = parse_policy("methods.py:words:blocks=3,name=second,fast=1", 12)
    assert method.blocks == (3,)
    assert parse_policy("methods.py:words:blocks=3/9,name=second,fast=1", 12).blocks == (3, 9)
    assert parse_policy("methods.py:First:least=4,blocks=3", 12).least == 4


def test_a_learner_of_the_suite() -> None:
    Path("learner.py").write_text(
        "from methods import ready\ndef learn(task, seed): return ready\n"
    )
    Path("methods.py").write_text(METHODS.replace("Twice(at", "TokenPrune((3, 6)"))
    command = "suite run digits-prune-v0 --learner learner.py:learn --seeds 0"
    assert main(command.split()) == 0
    (path,) = Path("suite/results/digits-prune-v0").iterdir()
    assert json.loads(path.read_text())["learner"] == "learner.py:learn"
    sys.modules.pop("methods")


# Saved and loaded -------------------------------------------------------------------------------
def other_process(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Python in another process, which has imported nothing of the user's yet."""
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",  # as here: other threads round otherwise
        },
        capture_output=True,
        text=True,
    )


@pytest.fixture
def logits() -> torch.Tensor:
    """``First`` and ``Left`` of ``methods.py``, compressed and saved as their names; the images."""
    images = (digits("test")[0][:20].float() / 255 - 0.5) / 0.5
    for name in ("First", "Left"):
        fast = tokenenv.compress("digits_vit", f"methods.py:{name}:keep=0.5")
        fast.save(name)
        torch.save(fast(images), f"{name}.pt")
    torch.save(images, "images.pt")
    return images


LOAD = """
import torch, tokenenv
for name in ("First", "Left"):
    fast = tokenenv.load_compressed(name, trust=True)
    assert torch.equal(fast(torch.load("images.pt")), torch.load(f"{name}.pt")), name
    assert type(fast.policy).__name__ == name
"""


def test_another_process_loads_it_with_trust(logits: torch.Tensor) -> None:
    done = other_process(LOAD)
    assert done.returncode == 0, done.stderr
    for name in ("First", "Left"):
        with pytest.raises(UserError) as caught:
            tokenenv.load_compressed(name)
        said = str(caught.value)
        assert str(Path.cwd() / "methods.py") in said and "give trust=True (--trust)" in said
        assert "register it (register_reducer" in said and "\n" not in said


def test_registered_it_needs_no_trust(logits: torch.Tensor) -> None:
    tokenenv.register_reducer("first")(load_own("own_module:First").object)
    assert type(tokenenv.load_compressed("First").policy).__module__ == "own_module"
    tokenenv.register_policy(load_own("own_module:Left").object)
    with pytest.raises(UserError, match="holds a 'Twice' of"):  # its rules are code, too
        tokenenv.load_compressed("Left")
    Path("methods.py").unlink()
    assert tokenenv.load_compressed("First")(logits).shape == (20, 10)


def test_a_file_that_changed_since_is_refused(
    logits: torch.Tensor, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("methods.py").write_text(METHODS + "open('ran', 'w').close()\n")
    for name in ("First", "Left"):
        error = mistake(f"evaluate {name} --trust --limit 5", capfd)
        assert "methods.py' has changed since its class" in error and "restore it" in error
    assert not Path("ran").exists()


def test_a_file_is_known_as_it_was_imported() -> None:
    """Changed between its import and saving: what is saved is not what the file says now."""
    fast = tokenenv.compress("digits_vit", "methods.py:First")
    Path("methods.py").write_text(METHODS + "\n")
    with pytest.raises(UserError, match=r"the First can't be read back: .* has changed since"):
        fast.save("fast")
    assert not Path("fast").exists()


@pytest.mark.parametrize("place", ["methods.py", "own_module"])
def test_what_can_not_be_found_any_more(place: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", f"{place}:First", "--out", "fast"]) == 0
    Path("methods.py" if place == "methods.py" else "own_module.py").unlink()
    sys.modules.pop("own_module", None)
    error = mistake("evaluate fast --trust --limit 5", capfd)
    assert "its class 'First' came from" in error and place in error
    assert "register it (register_reducer" in error and "and load again" in error


def test_a_class_that_no_import_finds() -> None:
    class Hidden(load_own("methods.py:First").object):  # type: ignore[misc]
        pass

    fast = tokenenv.compress("digits_vit", Hidden((3,)))
    with pytest.raises(UserError, match=r"the Hidden can't be read back: .*no class of that name"):
        fast.save("fast")
    register_reducer("hidden")(Hidden)
    fast.save("fast")
    assert type(tokenenv.load_compressed("fast").policy) is Hidden


def test_a_class_with_the_name_of_one_of_the_package() -> None:
    Path("twins.py").write_text(METHODS.replace("First", "EViT"))
    own = load_own("twins.py:EViT").object
    tokenenv.compress("digits_vit", own((3,))).save("fast")
    with pytest.raises(UserError, match="holds a 'EViT' of"):
        tokenenv.load_compressed("fast")
    assert type(tokenenv.load_compressed("fast", trust=True).policy) is own
    # Without an origin it could only be taken for the package's.
    local = type("EViT", (Reducer,), {"__module__": "nowhere"})
    with pytest.raises(UserError, match=r"would be read back as the tokenenv.*another name"):
        tokenenv.compress("digits_vit", local((3,))).save("other")


def test_registering_the_same_code_again() -> None:
    """A notebook's cell runs again, or a script that registers is also named in a command."""
    source = METHODS.replace("@dataclass(frozen=True)\nclass First", "@register\n\\g").replace(
        "\\g", "@dataclass(frozen=True)\nclass First"
    )
    head = "from tokenenv import register_reducer\nregister = register_reducer('first')\n"
    Path("methods.py").write_text(source.replace("import torch\n", "import torch\n" + head, 1))
    first = load_own("methods.py:First").object
    Path("methods.py").write_text(Path("methods.py").read_text() + "\n")
    second = load_own("methods.py:First").object
    assert first is not second and REDUCERS["first"] is second
    assert type(parse_policy("first:keep=0.4", 12)) is second
    with pytest.raises(
        UserError,
        match=r"reducer 'first' exists already, it is \S*methods\.First: give First another",
    ):
        register_reducer("first")(load_own("own_module:First").object)
    with pytest.raises(UserError, match="unknown argument 'kepe': first takes blocks, keep, least"):
        parse_policy("first:kepe=0.4", 12)


# Artefacts of somebody else's -------------------------------------------------------------------
@pytest.fixture
def hostile() -> dict[str, str]:
    """The origin of a class whose file leaves a mark when it runs."""
    Path("evil.py").write_text(METHODS + "open('marker', 'w').close()\n")
    digest = hashlib.sha256(Path("evil.py").read_bytes()).hexdigest()
    return {"file": str(Path("evil.py").resolve()), "name": "First", "sha256": digest}


def poison(path: Path, changes: dict[str, Any]) -> None:
    tensors, config = read_tensors(path)
    write_tensors(path, tensors, config | changes)


def test_code_that_a_policy_names_does_not_run(
    run: Path, hostile: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, "run")
    assert main(["compress", "norm:keep=0.5", "--out", "fast"]) == 0
    own, rules = {"class": "First", "origin": hostile}, {"rules": {"class": "X", "origin": hostile}}
    for changes in (own, rules, {"class": "First", "origin": {"module": "evil", "name": "First"}}):
        for folder in ("run", "fast"):
            poison(Path(folder, "policy.safetensors"), {"class": "TopK"} | changes)
        for command in (
            "evaluate run --limit 5",
            "evaluate fast --limit 5",
            "bench fast run --batch 1",
            "compare run --limit 5",
            "compress run --out again",
            "train rl4evit-finetune --images 60 --set batch=8 --set policy=run",
            "suite run digits-prune-v0 --learner run",
        ):
            assert "is a user's own code: to run it, give trust=True" in mistake(command, capfd)
        for load in (agents.load, tokenenv.load_compressed):
            with pytest.raises(UserError, match="is a user's own code"):
                load("fast")
        with pytest.raises(UserError, match="is a user's own code"):
            _ = tokenenv.Run.open("run").policy
    assert not Path("marker").exists()
    # It is what it says it is: trusted, it runs.
    poison(Path("run/policy.safetensors"), own)
    with pytest.raises(UserError, match="is not a policy of this version"):
        agents.load("run", trust=True)
    assert Path("marker").exists()


@pytest.mark.parametrize("key", ["pretrained", "checkpoint_path", "pretrained_cfg"])
def test_options_that_would_read_other_files(key: str) -> None:
    """Timm would load these; older ones unpickle them."""
    value = True if key == "pretrained" else "evil.pth"
    tokenenv.compress("digits_vit", "norm:keep=0.5").save("fast")
    model = tokenenv.load_backbone().model
    tokenenv.ltm.save_ltm(tokenenv.ltm.ltm(model), "ltm")
    for folder, name, load in (
        ("fast", "compressed.json", tokenenv.load_compressed),
        ("ltm", "ltm.json", tokenenv.ltm.load_ltm),
    ):
        load(folder)
        path = Path(folder, name)
        config = json.loads(path.read_text())
        config["options"][key] = value
        path.write_text(json.dumps(config))
        with pytest.raises(UserError, match=f"unknown field '{key}'"):
            load(folder)


def test_runs_and_results_name_code_that_does_not_run(run: Path, hostile: dict[str, str]) -> None:
    shutil.copytree(run, "run")
    for name in ("config.json", "report.json"):
        path = Path("run", name)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"origin": hostile}))
    assert tokenenv.Run.open("run").policy is not None
    assert main(["evaluate", "run", "--limit", "5"]) == 0
    assert main(["suite", "run", "digits-merge-v0", "--learner", "heuristic", "--out", "kept"]) == 0
    (path,) = Path("kept/results/digits-merge-v0").iterdir()
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | {"learner": "evil.py:First", "origin": hostile}))
    assert main(["suite", "score", "kept"]) == 2  # a result has no such field
    path.write_text(json.dumps(found | {"learner": "evil.py:First"}))
    assert main(["suite", "score", "kept"]) == 2  # it was edited
    del found["sha256"]  # as in results of older versions
    path.write_text(json.dumps(found | {"learner": "evil.py:First"}))
    assert main(["suite", "score", "kept"]) == 0
    assert not Path("marker").exists()


def test_a_run_of_ones_own_policy_trusts_itself() -> None:
    source = (ROOT / "examples/extend/own_system.py").read_text()
    source = source.replace("    def policy(", "    def own(").replace(
        "class LikelihoodConfig",
        "class Mine(ActorPolicy):\n    pass\n\n\n@dataclass(frozen=True)\nclass LikelihoodConfig",
    )
    source = source.replace("@dataclass(frozen=True)\nclass Mine", "class Mine")
    source = source.replace("    def own(", "    def policy(").replace(
        "policy = ActorPolicy(", "policy = Mine("
    )
    Path("mine.py").write_text(source)
    run = tokenenv.train(
        "mine.py:LikelihoodConfig", images=60, updates=1, evaluate_every=1, batch=8, calibrate=1
    )
    assert type(run.policy).__name__ == "Mine"
    assert tokenenv.evaluate(run, limit=10).what.startswith("runs/mine")
    with pytest.raises(UserError, match="holds a 'Mine' of"):
        _ = tokenenv.Run.open(run.folder).policy
    assert type(tokenenv.Run.open(run.folder, trust=True).policy).__name__ == "Mine"


# Mistakes ---------------------------------------------------------------------------------------
COMMANDS = ("evaluate {}", "bench {}", "compare {}", "compress {} --out fast")


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("gone.py:First", "there is no file 'gone.py'"),
        ("no_such_module:First", "No module named 'no_such_module'"),
        ("methods.py:Frist", "there is no 'Frist' in it; did you mean 'First'?"),
        ("slip.py:First", "SyntaxError: invalid syntax (slip.py, line 1)"),
        ("lacks.py:First", "ModuleNotFoundError: No module named 'not_installed'"),
        ("broken.py:First", "ZeroDivisionError: division by zero"),
        ("leaves.py:First", "SystemExit: 3"),
        ("methods.py:number", "is 5: name a subclass of tokenenv.reducers.Reducer"),
        ("methods.py:Neither", "Neither'>: name a subclass of tokenenv.reducers.Reducer"),
        ("methods.py:five", "'methods.py:five' makes 5: name a subclass"),
        (
            "methods.py:fails:keep=0.3",
            "(LookupError: no table for this): correct it",
        ),
        ("methods.py:make:kepe=0.3", "unknown argument 'kepe': methods.py:make takes keep"),
        ("methods.py:First:kepe=0.3", "methods.py:First takes blocks, keep, least"),
        ("methods.py:First:keep=much", "keep=much is not a number"),
        ("methods.py:First:blocks=99", "99"),
        ("methods.py:ready:keep=0.3", "is a method already: leave ':keep=0.3' out"),
        ("methods.py:words:name=a", "needs blocks=..."),
        ("methods.py:Needy", "needs ratio=..."),
        ("methods.py:Needy:ratio=1,table=x", "table can't be given as a word"),
        ("methods.py:Loose:keep=0.3", "field 'keep' that can't be set: write @dataclass(frozen"),
    ],
)
def test_one_line_with_the_reason_before_any_weights(
    word: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("slip.py").write_text("def First(:")
    Path("lacks.py").write_text("import not_installed")
    Path("broken.py").write_text("1 / 0")
    Path("leaves.py").write_text("raise SystemExit(3)")
    for command in COMMANDS:
        # The weights are missing too; what is wrong with WHAT comes first.
        assert reason in mistake(command.format(word) + " --weights gone.safetensors", capfd)


@pytest.mark.parametrize("what", ["tome:r=x", "tom:r=4", "evit:kepe=1", "gone/run"])
def test_what_is_checked_before_weights(what: str, capfd: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        error = mistake(command.format(what) + " --weights gone.safetensors", capfd)
        assert f"'{what}'" in error and "gone.safetensors" not in error


@pytest.mark.parametrize(
    ("word", "line"),
    [("broken.py:First", "return 1 / 0"), ("late.py:make", "return 2 / 0")],
)
def test_the_traceback_shows_ones_own_line(
    word: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("broken.py").write_text("def f():\n    return 1 / 0\n\nf()\n")
    Path("late.py").write_text("def make():\n    return 2 / 0\n")
    assert main(["--traceback", "evaluate", word]) == 2
    error = capsys.readouterr().err
    assert line in error and f'{word.partition(":")[0]}", line 2, in ' in error
    assert "ZeroDivisionError: division by zero" in error
    assert error.splitlines()[-1].startswith(f"tokenenv: '{word}'")


def test_weights_without_a_model(capfd: pytest.CaptureFixture[str]) -> None:
    save_file(timm.create_model("digits_vit_16").state_dict(), "large.safetensors")
    for command in (*(each.format("methods.py:First") for each in COMMANDS), QUICK):
        error = mistake(f"{command} --weights large.safetensors", capfd)
        assert "no --model was given, so they were read for 'digits_vit'" in error
