"""Methods of a user's own, in files and modules: in every command, saved and loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import evaluation, mistake
from own_methods import METHODS

import tokenenv
from agents.policies.words import parse_policy
from tokenenv.cli.main import main
from tokenenv.errors import UserError
from tokenenv.own import load_own
from tokenenv.reducers import REDUCERS, Reducer, register_reducer
from tokenenv.vit.digits import digits

pytestmark = pytest.mark.usefixtures("one_thread", "own_methods")

ROOT = Path(__file__).resolve().parents[1]


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
        "dense, exact",
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
