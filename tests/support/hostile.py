"""Every kind of file that the package reads: how it is written, changed at random, and read."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import pickle
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from command_line import QUICK
from helpers import backbone, source
from hypothesis import strategies as st
from test_training import trainer

import agents
import tokenenv
from agents.finetune.ltm import LTMConfig
from agents.finetune.tuner import FineTuner
from agents.policies import POLICY
from agents.training.held_back import HeldBack
from agents.training.run import CONFIG, MODEL, REPORT, Run
from agents.training.trainer import CHECKPOINT, Trainer
from tokenenv import ltm
from tokenenv.artefact import MOST_NESTED
from tokenenv.cli.main import main
from tokenenv.data import Stream
from tokenenv.errors import UserError
from tokenenv.suite.results import REFERENCE
from tokenenv.vit.digits import WEIGHTS

Draw = Callable[[Any], Any]

COMPARE = "compare keep-all tome:r=8 --limit 8 --batch 1 --rounds 1 --out"


# --- what is read ----------------------------------------------------------------------------
def finite(value: Any) -> None:
    """All numbers in a nested value."""
    json.dumps(value, allow_nan=False)


def command(words: str) -> str:
    """What a command prints; a mistake of its is a :class:`UserError` of one line."""
    printed, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
        status = main(words.split())
    if status == 2:
        (line,) = said.getvalue().splitlines()
        raise UserError(line)
    assert status == 0
    assert not re.search(r"\b(nan|inf)\b", printed.getvalue(), re.IGNORECASE), printed.getvalue()
    return printed.getvalue()


def evaluated(words: str) -> None:
    command(f"evaluate {words} --limit 4 --json evaluated.json")
    finite(json.loads(Path("evaluated.json").read_text()))


def read_run(folder: Path) -> None:
    run = Run.open(folder)
    finite(run.to_dict())
    assert repr(run) and run._repr_html_() and run.policy is not None
    evaluated(".")


def read_tuned(folder: Path) -> None:
    finite(Run.open(folder).to_dict())
    evaluated(".")


def tuning(folder: Path) -> Trainer:
    """A fine-tuning as :func:`test_training.trainer` makes a training."""
    torch.manual_seed(0)
    config = LTMConfig(updates=4, batch=4, ratio=0.5, evaluate_every=1, eta=5.0)
    fit, held_back = source().split(0.2, 0)
    order, judge = Stream(fit, config.batch, 0), HeldBack(backbone(), held_back)
    student = config.student(backbone(), "small")
    return Trainer(
        FineTuner(student, backbone(), order, config, 0, clean=fit), order,
        lambda trainee: judge.trainee(trainee, fit), folder, updates=config.updates,
        evaluate_every=config.evaluate_every, target_saving=0.0, config={}, shown="loss",
    )  # fmt: skip


def resume(resumed: Trainer) -> None:
    """Go on for one update."""
    resumed.resume()
    resumed.updates = resumed.done + 1
    with contextlib.redirect_stdout(io.StringIO()):
        resumed.run()
    finite(resumed.history)
    assert resumed.best is not None
    finite(resumed.best.numbers())
    for tensor in resumed.learner.policy.state_dict().values():
        assert tensor.isfinite().all()


def read_checkpoint(folder: Path) -> None:
    resume(trainer(folder))


def read_tuning(folder: Path) -> None:
    resume(tuning(folder))


def read_compressed(folder: Path) -> None:
    tokenenv.load_compressed(folder)
    evaluated(".")


def read_ltm(folder: Path) -> None:
    ltm.load_ltm(folder)
    evaluated(".")


def read_comparison(folder: Path) -> None:
    command(COMPARE.replace("tome:r=8", "tome:r=8 tome:r=4") + " .")
    finite(json.loads(Path("table.json").read_text()))


def read_suite(folder: Path) -> None:
    command("suite score . --marl-eval scores.json")
    finite(json.loads(Path("scores.json").read_text()))
    command("suite plot .")


def read_weights(folder: Path) -> None:
    (file,) = folder.glob("weights.*")
    evaluated(f"tome:r=8 --model digits_vit --weights {file.name}")


READERS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "run": (read_run, (CONFIG, REPORT, POLICY)),
    "tuned": (read_tuned, (CONFIG, REPORT, POLICY, MODEL)),
    "checkpoint": (read_checkpoint, (CHECKPOINT,)),
    "tuning": (read_tuning, (CHECKPOINT,)),
    "compressed": (read_compressed, ("compressed.json", POLICY, MODEL)),
    "ltm": (read_ltm, ("ltm.json", MODEL)),
    "comparison": (
        read_comparison,
        ("state/conditions.json", "state/batch-1.json", "state/*.safetensors"),
    ),
    "suite": (read_suite, ("results/digits-prune-v0/*.json",)),
    "weights": (read_weights, ("weights.safetensors",)),
    "pickle": (read_weights, ("weights.pth",)),
}


# --- what was written ------------------------------------------------------------------------
def write_all(root: Path) -> None:
    """One of each artefact, by the package's own commands and functions."""
    command(f"{QUICK} --out {root / 'run'}")
    (root / "run" / CHECKPOINT).unlink()  # read on its own
    words = "train evit --images 40 --set updates=1 --set batch=4 --set held_back=0.2"
    command(f"{words} --out {root / 'tuned'}")
    (root / "tuned" / CHECKPOINT).unlink()
    for made, name in ((trainer, "checkpoint"), (tuning, "tuning")):
        (root / name).mkdir()
        short = made(root / name)
        short.updates = 2
        with contextlib.redirect_stdout(io.StringIO()):
            short.run()
    model = timm.create_model("digits_vit")
    model.load_state_dict(tokenenv.load_backbone().model.state_dict())
    tokenenv.compress(model, agents.load(root / "run")).save(root / "compressed")
    ltm.save_ltm(ltm.ltm(model, 0.8), root / "ltm")
    command(f"{COMPARE} {root / 'comparison'}")
    results = root / "suite" / "results" / "digits-prune-v0"
    results.mkdir(parents=True)
    for row in json.loads((REFERENCE / "digits-prune-v0.json").read_text()):
        if row["learner"] in ("random", "heuristic"):
            name = f"{row['learner']}-{row['seed']}.json"
            (results / name).write_text(json.dumps(row))
    for name in ("weights", "pickle"):
        (root / name).mkdir()
    shutil.copy(WEIGHTS, root / "weights" / "weights.safetensors")
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, root / "pickle" / "weights.pth")


# --- what is changed -------------------------------------------------------------------------
EVIL = "evil.py"
HOSTILE_KEYS = {
    "pretrained": True,
    "pretrained_cfg_overlay": {"hf_hub_id": "a/b", "url": "http://localhost/x.pth"},
    "checkpoint_path": "/etc/passwd",
    "depth": 100_000,
    "embed_dim": 10**9,
    "class": "TokenPrune",
    "origin": {"file": EVIL, "name": "Evil", "module": "evil"},
    "weights": "hf-hub:a/b",
    "frozen": False,
}
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([-1, 0, 1, 2, 3, 1000, 65_536, 10**9]),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["hf-hub:a/b", "local-dir:/etc", "../../x", "resnet18", "digits_vit"]),
    st.lists(st.integers(-3, 3), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from(list(HOSTILE_KEYS.values())),
)
NUMBERS = st.sampled_from(
    [struct.pack("<f", x) for x in (float("nan"), float("inf"), 3e38, -3e38, 1e-40, 0.0, 7.0)]
    + [b"\xff" * 4, struct.pack("<d", 1e308)]
)
"""Bytes of numbers that may be no numbers, or too large to compute with."""


class Attack:
    """What a pickle runs when it is read as pickles are."""

    def __reduce__(self) -> Any:
        return exec, ("open('ran', 'w')",)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of everything in a JSON value."""
    yield path
    inner: Any = ()
    if isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list):
        inner = list(enumerate(value))[:6]
    for key, one in inner:
        yield from places(one, (*path, key))


def changed(value: Any, draw: Draw) -> Any:
    """A copy with one thing replaced, removed or added."""
    value = copy.deepcopy(value)
    path = draw(st.sampled_from(list(places(value))))
    how = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
    if not path:
        return draw(VALUES) if how == "replace" else value
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    if how == "replace":
        parent[path[-1]] = draw(VALUES)
    elif how == "remove":
        del parent[path[-1]]
    elif isinstance(parent, dict):
        key = draw(st.sampled_from(sorted(HOSTILE_KEYS)))
        parent[key] = HOSTILE_KEYS[key]
    else:
        parent.append(draw(VALUES))
    return value


def header(content: bytes) -> Any:
    """The header of a safetensors file."""
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size])


def with_header(content: bytes, new: Any) -> bytes:
    """The file with another header."""
    (size,) = struct.unpack("<Q", content[:8])
    told = json.dumps(new).encode()
    return struct.pack("<Q", len(told)) + told + content[8 + size :]


def with_numbers(content: bytes, draw: Draw) -> bytes:
    """The file with other numbers in one of its tensors: in all of it, or in its first."""
    (size,) = struct.unpack("<Q", content[:8])
    tensors = {name: told for name, told in header(content).items() if name != "__metadata__"}
    start, end = tensors[draw(st.sampled_from(sorted(tensors)))]["data_offsets"]
    number, first = draw(NUMBERS), 8 + size + start
    length = end - start if draw(st.booleans()) else min(len(number), end - start)
    new = (number * (length // len(number) + 1))[:length]
    return content[:first] + new + content[first + length :]


def of_tensors(content: bytes, draw: Draw) -> bytes:
    """A safetensors file with something else in it: words, tensors' descriptions, numbers."""
    known = header(content)
    told = known.get("__metadata__", {}).get("tokenenv")
    kinds = ["words", "words"] * (told is not None) + ["header"]
    if known.keys() - {"__metadata__"}:  # a reducer has no tensors
        kinds.append("numbers")
    how = draw(st.sampled_from(kinds))
    if how == "numbers":
        return with_numbers(content, draw)
    if how == "header":
        return with_header(content, changed(known, draw))
    new = json.dumps(changed(json.loads(told), draw))
    return with_header(content, {**known, "__metadata__": {"tokenenv": new}})


def nested(content: bytes, tensors: bool, draw: Draw) -> bytes:
    """JSON that is nested deeper than is read."""
    deep = draw(st.sampled_from([MOST_NESTED + 1, 100_000]))
    new = "[" * deep + "]" * deep
    if not tensors:
        return new.encode()
    return with_header(content, {**header(content), "__metadata__": {"tokenenv": new}})


def pickled(content: bytes, draw: Draw) -> bytes:
    """A checkpoint of torch's with something else in it, or a plain pickle."""
    saved = io.BytesIO()
    state = torch.load(io.BytesIO(content), weights_only=True)
    how = draw(st.sampled_from(["attack", "plain", "replace", "remove", "numbers"]))
    if how == "plain":
        return pickle.dumps(draw(st.sampled_from([Attack(), state, [], b""])))
    if how == "attack":
        state["args"] = Attack()
    elif how == "replace":
        state["state_dict"] = draw(VALUES)
    else:
        tensors = state["state_dict"]
        name = draw(st.sampled_from(sorted(tensors)))
        if how == "remove":
            del tensors[name]
        else:
            values = [torch.nan, torch.inf, 3e38, 0.0, 1]
            tensors[name] = torch.full_like(tensors[name], draw(st.sampled_from(values)))
    torch.save(state, saved)
    return saved.getvalue()


def mutated(file: Path, draw: Draw) -> bytes:
    """One change of a file: of what it says, of how deep it lies, of bytes or of its length."""
    content, tensors = file.read_bytes(), file.suffix == ".safetensors"
    how = draw(st.sampled_from(["said"] * 7 + ["deep", "byte", "cut"]))
    if how == "cut":
        return content[: draw(st.integers(0, len(content) - 1))]
    if how == "byte":  # of the header: other values of weights are still weights
        (size,) = struct.unpack("<Q", content[:8]) if tensors else (len(content) - 8,)
        at = draw(st.integers(0, 8 + size - 1))
        return content[:at] + bytes([draw(st.integers(0, 255))]) + content[at + 1 :]
    if file.suffix == ".pth":
        return pickled(content, draw)
    if how == "deep":
        return nested(content, tensors, draw)
    if tensors:
        return of_tensors(content, draw)
    return json.dumps(changed(json.loads(content), draw)).encode()
