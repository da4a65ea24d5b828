"""Every file that the package reads, changed at random: it is read, or refused in one line.

Never a traceback, never a connection, never code run, never a number that is not finite.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_training import trainer
from torch import nn

import agents
import tokenenv
from agents.training import Run
from agents.training.run import CONFIG, REPORT
from agents.training.trainer import CHECKPOINT
from tokenenv import ltm
from tokenenv.artefact import MOST_NESTED, Unfit, parse_json
from tokenenv.cli.main import main
from tokenenv.deploy.compressed import POLICY
from tokenenv.errors import UserError
from tokenenv.measure.state import State
from tokenenv.suite.results import REFERENCE, read_result


def answers(model: nn.Module, size: Sequence[int]) -> None:
    """A model gives finite logits for images of its size and precision."""
    images = torch.randn(2, 1, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        finite(model(images.to(next(model.parameters()).dtype)))


# --- what is read ----------------------------------------------------------------------------
def finite(value: Any) -> None:
    """All numbers in a nested value."""
    if isinstance(value, torch.Tensor):
        assert value.isfinite().all()
    else:
        json.dumps(value, allow_nan=False)


def read_run(folder: Path) -> None:
    run = Run.open(folder)
    finite(run.to_dict())
    assert repr(run) and run._repr_html_()


def read_policy(folder: Path) -> None:
    answers(tokenenv.compress(timm.create_model("digits_vit"), agents.load(folder)), (8, 8))


def read_checkpoint(folder: Path) -> None:
    resumed = trainer(folder)
    resumed.resume()
    finite(resumed.history)
    assert resumed.best is not None
    finite(resumed.best.numbers())


def read_compressed(folder: Path) -> None:
    model = tokenenv.load_compressed(folder)
    answers(model, model.backbone.image_shape[1:])


def read_ltm(folder: Path) -> None:
    model = ltm.load_ltm(folder)
    answers(model, model.config["image_size"])


def read_comparison(folder: Path) -> None:
    before = json.loads((folder / "asked.json").read_text())
    state = State(folder, before["conditions"])
    result = state.load(before["key"])
    if result is not None:
        finite(result.report())
    for speed in state.load_speeds(1, before["asked"]) or []:
        finite(speed.to_dict())


def read_suite(folder: Path) -> None:
    result = read_result(folder / "result.json")
    finite(result.as_json())
    finite([result.area, result.saved(), result.dense_top1])


# --- what was written ------------------------------------------------------------------------
def write_all(root: Path) -> None:
    """One of each artefact, by the package's own commands and functions."""
    quick = (
        "updates=1 evaluate_every=1 batch=8 hidden=8 epochs=1 minibatches=1 blocks=1/4 calibrate=2"
    )
    sets = [word for setting in quick.split() for word in ("--set", setting)]
    train = ["train", "rl4evit", "--images", "60", "--out", str(root / "run"), *sets]
    assert main(train) == 0
    shutil.copytree(root / "run", root / "policy")
    (root / "checkpoint").mkdir()
    short = trainer(root / "checkpoint")
    short.updates = 2
    short.run()
    model = timm.create_model("digits_vit")
    tokenenv.compress(model, agents.load(root / "run")).save(root / "compressed")
    ltm.save_ltm(ltm.ltm(model, 0.8), root / "ltm")
    place = root / "comparison"
    words = f"compare keep-all --limit 8 --batch 1 --rounds 1 --out {place}"
    assert main(words.split()) == 0
    state = place / "state"
    (row,) = state.glob("*.safetensors")
    asked = {
        "conditions": json.loads((state / "conditions.json").read_text()),
        "key": header(row.read_bytes())["key"],
        "asked": json.loads((state / "batch-1.json").read_text())["asked"],
    }
    (place / "asked.json").write_text(json.dumps(asked))
    (root / "suite").mkdir()
    result = json.loads((REFERENCE / "digits-prune-v0.json").read_text())[0]
    (root / "suite" / "result.json").write_text(json.dumps(result))


READERS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "run": (read_run, (CONFIG, REPORT)),
    "policy": (read_policy, (POLICY,)),
    "checkpoint": (read_checkpoint, (CHECKPOINT,)),
    "compressed": (read_compressed, ("compressed.json", POLICY)),
    "ltm": (read_ltm, ("ltm.json",)),
    "comparison": (
        read_comparison,
        ("state/conditions.json", "state/batch-1.json", "state/*.safetensors"),
    ),
    "suite": (read_suite, ("result.json",)),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("written")
    write_all(root)
    return root


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


def changed(value: Any, draw: Callable[[Any], Any]) -> Any:
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
    """What the package wrote into a safetensors file beside the tensors."""
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["tokenenv"])


def with_header(content: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """The file after ``change`` of its header."""
    (size,) = struct.unpack("<Q", content[:8])
    new = json.dumps(change(json.loads(content[8 : 8 + size]))).encode()
    return struct.pack("<Q", len(new)) + new + content[8 + size :]


def mutated(content: bytes, tensors: bool, draw: Callable[[Any], Any]) -> bytes:
    """One change of a file: of what it says, of how deep it lies, of bytes or of its length."""
    how = draw(st.sampled_from(["json"] * 6 + ["deep", "bytes", "cut", *["tensor"] * tensors]))
    (size,) = struct.unpack("<Q", content[:8]) if tensors else (len(content) - 8,)
    if how == "cut":
        return content[: draw(st.integers(0, len(content) - 1))]
    if how == "bytes":  # of the header: other values of weights are still weights
        at = draw(st.integers(0, 8 + size - 1))
        return content[:at] + bytes([draw(st.integers(0, 255))]) + content[at + 1 :]
    if how == "tensor":
        return with_header(content, lambda known: changed(known, draw))
    if how == "deep":
        new = "[" * (deep := draw(st.sampled_from([MOST_NESTED + 1, 100_000]))) + "]" * deep
    else:
        new = json.dumps(changed(header(content) if tensors else json.loads(content), draw))
    if not tensors:
        return new.encode()
    return with_header(content, lambda known: {**known, "__metadata__": {"tokenenv": new}})


# --- the property ----------------------------------------------------------------------------
class Connected(BaseException):
    """Not an Exception: no reader can take it for a damaged file."""


def refuse(*args: Any, **kwargs: Any) -> Any:
    raise Connected(str(args)[:100])


def check(kind: str, written: Path, place: Path, draw: Callable[[Any], Any]) -> None:
    """Change one file of an artefact and read it."""
    read, patterns = READERS[kind]
    if place.exists():
        shutil.rmtree(place)
    shutil.copytree(written / kind, place)
    (place / EVIL).write_text(f"open({str(place / 'ran')!r}, 'w')\nclass Evil: pass\n")
    (file,) = place.glob(draw(st.sampled_from(patterns)))
    file.write_bytes(mutated(file.read_bytes(), file.suffix == ".safetensors", draw))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(socket, "socket", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        try:
            read(place)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
    assert not (place / "ran").exists()


def examples(count: int) -> Any:
    slow = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=slow)


@pytest.mark.parametrize("kind", READERS)
@examples(30)  # 210 in all
@given(data=st.data())
def test_a_changed_file_is_read_or_refused(
    kind: str, written: Path, tmp_path: Path, data: st.DataObject
) -> None:
    check(kind, written, tmp_path / "changed", data.draw)


@pytest.mark.slow
@pytest.mark.parametrize("kind", READERS)
@examples(300)  # 2,100 in all
@given(data=st.data())
def test_many_changed_files_are_read_or_refused(
    kind: str, written: Path, tmp_path: Path, data: st.DataObject
) -> None:
    check(kind, written, tmp_path / "changed", data.draw)


@pytest.mark.parametrize("kind", READERS)
def test_unchanged_it_is_read(kind: str, written: Path) -> None:
    READERS[kind][0](written / kind)


# --- known attacks ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("section", "key", "value", "reason"),
    [
        ("options", "pretrained", True, "unknown field 'pretrained'"),
        ("options", "pretrained_cfg_overlay", {"hf_hub_id": "a/b"}, "unknown field"),
        ("options", "checkpoint_path", "/etc/passwd", "unknown field 'checkpoint_path'"),
        ("options", "depth", 100_000, "unknown field 'depth'"),
        ("options", "img_size", [10**6, 10**6], "'img_size' is [1000000, 1000000], not"),
        ("options", "in_chans", True, "'in_chans' is True, not a whole number from 1 to 1024"),
        ("", "model", "hf-hub:a/b", "unknown model 'hf-hub:a/b'"),
        ("", "model", "local-dir:/etc", "unknown model 'local-dir:/etc'"),
        ("", "dtype", "int8", "'dtype' is 'int8', not one of 'float32'"),
    ],
)
def test_only_the_options_that_are_saved_reach_timm(
    written: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    section: str,
    key: str,
    value: Any,
    reason: str,
) -> None:
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for kind, name in (("ltm", "ltm.json"), ("compressed", "compressed.json")):
        shutil.copytree(written / kind, tmp_path / kind)
        config = json.loads((tmp_path / kind / name).read_text())
        (config[section] if section else config)[key] = value
        (tmp_path / kind / name).write_text(json.dumps(config))
        with pytest.raises(UserError, match=re.escape(reason)):
            READERS[kind][0](tmp_path / kind)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 200 + "]" * 200, "nested deeper than 100"),
        ("[" * 100_000, "nested deeper than 100"),
        ("[NaN]", "NaN is no finite number"),
        ("[1e999]", "1e999 is no finite number"),
        ("9" * 5000, "99999999999999999999 is out of the range of whole numbers"),
        ("{", "no JSON, JSONDecodeError"),
        (b"\xff\xfe\xfa", "no JSON, UnicodeDecodeError"),
    ],
)
def test_json_has_limits(text: str | bytes, reason: str) -> None:
    with pytest.raises(Unfit, match=reason):
        parse_json(text)
