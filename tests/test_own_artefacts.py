"""Artefacts of somebody else's that name code or files: none of them runs or is read."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import mistake
from own_methods import METHODS

import agents
import tokenenv
from tokenenv.cli.main import main
from tokenenv.errors import UserError
from tokenenv.storage import read_tensors, write_tensors

pytestmark = pytest.mark.usefixtures("one_thread", "own_methods")


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
