"""Several processes that train together learn what one does, and end together."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import backbone, source, start
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training import on_call
from torch.testing import assert_close

from agents.learners.ppo import PPO
from agents.learners.rollout import minibatches
from agents.systems import find_system
from agents.systems.dora import DoraConfig, DoraPruneConfig
from agents.systems.rl4evit import RL4EViTConfig
from agents.training.request import Request
from agents.training.trainer import CHECKPOINT
from agents.workers import ALONE, Rows, Workers
from tokenenv.cli.main import main
from tokenenv.data import Batch, ImageSource, Stream, open_source
from tokenenv.data.pixels import PixelStore
from tokenenv.errors import UserError
from tokenenv.measure.opening import Model
from tokenenv.storage import read_tensors, unflatten_state

SMALL: dict[str, Any] = {"batch": 12, "repeats": 2, "epochs": 2, "minibatches": 3, "blocks": (1, 3)}
CASES: dict[str, tuple[Any, int]] = {
    "rl4evit": (RL4EViTConfig(**SMALL, hidden=(8,), lr=1e-2), 100),
    # Five images a batch in two processes, thirteen in an epoch.
    "rl4evit-uneven": (RL4EViTConfig(**SMALL | {"batch": 10}, hidden=(8,)), 13),
    "dora": (DoraConfig(**SMALL | {"batch": 10}, hidden=(8,), initial_merge=0.9), 13),
    "dora-prune": (DoraPruneConfig(**SMALL, width=8, critic_depth=1, initial_gate=0.6), 100),
    # Minibatches of one image: one of the two processes always has none, and gates stay closed.
    "dora-prune-tiny": (
        DoraPruneConfig(
            **SMALL | {"batch": 2, "repeats": 1, "minibatches": 4},
            width=8, critic_depth=1, critic_width=8, initial_gate=0.3,
        ),
        100,
    ),
}  # fmt: skip


class Meeting:
    """What threads tell each other, as processes do by :meth:`Workers.union`."""

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count, timeout=60)
        self.told: list[list[int]] = []

    def __call__(self, numbers: list[int]) -> list[int]:
        self.told.append(numbers)
        self.barrier.wait()
        union = sorted({number for each in self.told for number in each})
        if self.barrier.wait() == 0:
            self.told.clear()
        self.barrier.wait()
        return union


def learner(case: str, workers: Workers) -> Any:
    config, images = CASES[case]
    torch.manual_seed(0)
    game = config.game(backbone(), source().subset(images, 0))
    game.share(workers.rank, workers.count, seed=1)
    found = config.learner(config.policy(game, "small"), game, 0, workers)
    if case == "rl4evit-uneven":
        found.config = dataclasses.replace(found.config, advantage_norm="per_agent")
    return found


def learned(case: str, workers: Workers) -> dict[str, Any]:
    """All that a learner has after three updates, and what it said of them."""
    it = learner(case, workers)
    said = [it.update() for _ in range(3)]
    return {"said": said, "state": it.state_dict(), "order": it.arena.stream.state_dict()}


def flawed() -> ImageSource:
    """Seventy digits, three of which can't be read."""
    found = open_source("digits", backbone().model, split="train", limit=70)
    store = found.altered("flawed", lambda image, position: image)._store
    load = store._load

    def fail(position: int) -> Any:
        if position in [found._positions[i] for i in (3, 65, 68)]:
            raise OSError("torn")
        return load(position)

    found._store = PixelStore(fail, store.preprocess)
    return found


LEARN = """
import sys
import torch
from agents.systems.rl4evit import RL4EViTConfig
from agents.workers import join
from helpers import backbone
from test_workers import CASES, flawed, learned
from tokenenv.errors import UserError
torch.set_num_threads(1)
with join("cpu") as (workers, device):
    found = {case: learned(case, workers) for case in CASES}
    source = flawed()
    game = RL4EViTConfig(batch=8).game(backbone(), source)
    game.share(workers.rank, workers.count, 0, workers.union)
    found["flawed"] = workers.gather([game.stream.next().index.tolist() for _ in range(90)])
    assert workers.agree(workers.rank == 1) and not workers.agree(False)
    if not workers.rank:
        torch.save(found, sys.argv[1])
    with workers.together():
        if workers.rank:
            raise UserError("odd")
"""


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("two") / "learned"
    ends = finish(start(LEARN, str(out)))
    assert [end.code for end in ends] == [1, 2], ends
    assert ends[0].errors.endswith("UserError: odd\n") and not ends[1].errors
    return torch.load(out, weights_only=True)


class End(NamedTuple):
    """How a process ended, and what it said."""

    code: int
    output: str
    errors: str


def finish(processes: list[subprocess.Popen[str]]) -> list[End]:
    said = [process.communicate(timeout=300) for process in processes]
    return [End(p.returncode, *words) for p, words in zip(processes, said, strict=True)]


@pytest.mark.parametrize("case", CASES)
def test_two_learn_what_one_does(case: str, by_two: Any) -> None:
    one, two = learned(case, ALONE), by_two[case]
    assert one["order"] == two["order"]
    for name in ("generator", "order"):
        assert torch.equal(one["state"][name], two["state"][name])
    for mine, theirs in zip(one["said"], two["said"], strict=True):
        if case == "dora-prune-tiny":  # one image has no variance
            mine["explained_variance"] = theirs["explained_variance"]
        assert mine == pytest.approx(theirs, abs=1e-5, rel=1e-5)
    close(one["state"], two["state"])


def close(one: Any, two: Any) -> None:
    """Whether two learners' weights and statistics differ by rounding only."""
    for part in ("policy", "critic", "value_norm"):
        assert one[part].keys() == two[part].keys()
        for name, tensor in one[part].items():
            # What is added to all scores changes nothing: its gradient is noise, scaled by Adam.
            # Images lie in other groups in each process, so that sums round otherwise.
            atol = 1e-3 if name == "selector.2.bias" else 5e-5
            assert_close(two[part][name], tensor, atol=atol, rtol=1e-5, msg=f"{part}.{name}")


def test_they_differ_from_one_with_half_the_images() -> None:
    """The test above would see it."""
    whole, half = learner("rl4evit", ALONE), learner("rl4evit", ALONE)
    half.arena.share(0, 2, 1)
    half.rows = Rows.of(ALONE, half.arena.batch_size)
    for it in (whole, half):
        it.update()
    with pytest.raises(AssertionError):
        close(whole.state_dict(), half.state_dict())


def test_two_draw_what_one_does_though_images_are_unreadable(by_two: Any) -> None:
    """Also over several epochs, and though each finds out about its own images only."""
    stream = Stream(flawed(), 2, 0)
    assert [by_two["flawed"][0][i] + by_two["flawed"][1][i] for i in range(90)] == [
        stream.next().index.tolist() for _ in range(90)
    ]


@given(
    batch=st.integers(1, 17), of=st.integers(1, 5), bad=st.sets(st.integers(0, 9), max_size=9),
    seed=st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_parts_of_a_batch_are_the_batch(batch: int, of: int, bad: set[int], seed: int) -> None:
    images = open_source("digits", backbone().model, split="train", limit=10)
    load, torn = images._store._load, [images._positions[i] for i in bad]

    def tear(position: int) -> Any:
        if position in torn:
            raise OSError("torn")
        return load(position)

    images._store = PixelStore(tear, images._store.preprocess)
    if batch < of:
        with pytest.raises(UserError, match=f"{of} processes cannot share a batch of {batch}"):
            Stream(images, batch, seed, 0, of)
        return
    whole = Stream(images, batch, seed)
    agree = Meeting(of)
    parts = [Stream(images, batch, seed, rank, of, agree) for rank in range(of)]
    with ThreadPoolExecutor(of) as pool:
        drawn = list(pool.map(lambda part: [part.next() for _ in range(4)], parts))
    for turn in range(4):
        expected = whole.next()
        found = Batch(*map(torch.cat, zip(*(each[turn] for each in drawn), strict=True)))
        assert all(map(torch.equal, found, expected))
    assert all(part.state_dict() == whole.state_dict() for part in parts)
    sizes = [part.part_size for part in parts]
    assert sum(sizes) == batch and max(sizes) - min(sizes) <= 1


def test_an_image_that_nobody_knew_of_is_one_line() -> None:
    part = Stream(flawed(), 70, 0, 1, 2)
    with pytest.raises(UserError, match=r"'digits/train/\d+' can no longer be read: put it back"):
        part.next()


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_minibatches_and_noise_of_parts_are_those_of_the_whole(data: st.DataObject) -> None:
    here = data.draw(st.lists(st.integers(0, 5), min_size=2, max_size=4).filter(any))
    steps, count = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    starts = [sum(here[:rank]) for rank in range(len(here))]
    rows = [
        Rows(Workers(rank, len(here)), starts[rank], here[rank], sum(here))
        for rank in range(len(here))
    ]
    whole = minibatches(steps, Rows.of(ALONE, sum(here)), count, torch.Generator().manual_seed(3))
    parts = [minibatches(steps, part, count, torch.Generator().manual_seed(3)) for part in rows]
    for expected, *found in zip(whole, *parts, strict=True):
        positions = []
        for part, index in zip(rows, found, strict=True):
            step, row = index // max(part.here, 1), index % max(part.here, 1)
            positions += (step * sum(here) + part.first + row).tolist()
        assert sorted(positions) == sorted(expected.tolist())
    noise = [part.rand((part.here, 2, 3), torch.Generator().manual_seed(4)) for part in rows]
    alone = Rows().rand((sum(here), 2, 3), torch.Generator().manual_seed(4))
    assert torch.equal(torch.cat(noise), alone)


# Whole runs --------------------------------------------------------------------------------------
COMMAND = (
    "train {} --images 40 --set updates=4 --set evaluate_every=2 --set batch=10 --set repeats=2 "
    "--set epochs=1 --set minibatches=2 --set calibrate=1 --set blocks=2/7 --out {}"
)
RUN = """
import os, signal, sys
import torch
from agents.learners.ppo import PPO
from tokenenv.cli.main import main
from agents.training.request import Request

torch.set_num_threads(1)
Request.final_images = lambda request, backbone, held_back: held_back  # fewer than 600
rank, call, number = map(int, sys.argv[1].split("/"))
calls, descend = 0, PPO._descend

def strike(*args):
    global calls
    calls += 1
    if calls == call and os.environ["RANK"] == str(rank):
        os.kill(os.getpid(), number)
    return descend(*args)

PPO._descend = strike
sys.exit(main(sys.argv[2:]))
"""
DESCENTS = 2  # in an update


def run(*words: str, strike: tuple[int, int, int] = (0, 0, 0), cwd: Path) -> list[End]:
    """The command in two processes; in process ``strike[0]``, at a descent, a signal."""
    return finish(start(RUN, "/".join(map(str, strike)), *words, cwd=cwd))


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Run commands here, in one thread, without the 600 images of the report."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Request, "final_images", lambda request, backbone, held_back: held_back)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield monkeypatch
    torch.set_num_threads(threads)


def ending(out: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The checkpoint's header, and the learner in it."""
    tensors, saved = read_tensors(Path(out, CHECKPOINT))
    state: dict[str, Any] = unflatten_state(saved["state"], tensors)
    return saved, state


def same_run(one: str, two: str) -> None:
    """Whether two runs ended alike."""
    (saved, state), (other, theirs) = ending(one), ending(two)
    assert saved["done"] == other["done"] == 4
    close(state["learner"], theirs["learner"])
    first, *others = state["orders"] + theirs["orders"]
    for order in others:
        assert order["stream"] == first["stream"]
        assert order["price"] == pytest.approx(first["price"])
    for mine, other_row in zip(saved["history"], other["history"], strict=True):
        assert mine == pytest.approx(other_row, abs=1e-4, rel=1e-4)


def test_sigterm_to_one_stops_all_and_one_alone_goes_on(
    tmp_path: Path, alone: pytest.MonkeyPatch
) -> None:
    command = COMMAND.format("dora-prune", "stopped").split()
    ends = run(*command, strike=(1, 2 * DESCENTS + 1, signal.SIGTERM), cwd=tmp_path)
    assert [end.code for end in ends] == [130, 0], ends
    assert not ends[1].output and not ends[1].errors
    assert "2 processes" in ends[0].output and "trained 3 updates" in ends[0].output
    assert json.loads(Path("stopped", "report.json").read_text())["stopped_early"]
    assert ending("stopped")[0]["done"] == 3
    assert main([*command, "--resume"]) == 0
    assert main(COMMAND.format("dora-prune", "whole").split()) == 0
    same_run("stopped", "whole")


def test_two_go_on_with_what_one_began(tmp_path: Path, alone: pytest.MonkeyPatch) -> None:
    command = COMMAND.format("rl4evit", "begun").split()
    assert main(COMMAND.format("rl4evit", "whole").split()) == 0
    with alone.context() as patch:
        stop = on_call(DESCENTS + 1, lambda: signal.raise_signal(signal.SIGTERM), PPO._descend)
        patch.setattr(PPO, "_descend", stop)
        assert main(command) == 130
    assert ending("begun")[0]["done"] == 2
    ends = run(*command, "--resume", cwd=tmp_path)
    assert [end.code for end in ends] == [0, 0], ends
    same_run("begun", "whole")


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_who_loses_another_says_so_and_the_checkpoint_is_whole(rank: int, tmp_path: Path) -> None:
    command = COMMAND.format("dora", "run").split()
    ends = run(*command, strike=(rank, 3 * DESCENTS + 1, signal.SIGKILL), cwd=tmp_path)
    assert ends[rank].code == -signal.SIGKILL, ends
    survivor = ends[1 - rank]
    assert survivor.code == 2
    assert re.fullmatch(
        rf"tokenenv: process {1 - rank} of 2 stops, because another one ended or does not answer "
        r"\(.*\): see what that one said; the same command with --out and --resume goes on from "
        r"the last checkpoint\n",
        survivor.errors,
    ), survivor.errors
    saved, _ = ending(str(tmp_path / "run"))
    assert saved["done"] == 2

    ends = run(*command, cwd=tmp_path)  # only the first process looks into the folder
    assert [end.code for end in ends] == [2, 2], ends
    assert re.fullmatch(
        "tokenenv: --out 'run' already holds a run: add --resume.*\n", ends[0].errors
    )
    assert ends[1][1:] == ("", "")


# Mistakes ----------------------------------------------------------------------------------------
def several(monkeypatch: pytest.MonkeyPatch, **environment: str) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, environment.get(name, value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        ("train dora --device cuda", {}, "2 processes on this machine share 1 GPUs: start as many"),
        ("train mstm --device cuda:1", {}, "cuda:1 is one GPU for 2 processes: use --device cuda"),
        ("train dora", {"RANK": ""}, "RANK=: start several processes with torchrun"),
        ("train dora", {"WORLD_SIZE": "two"}, "WORLD_SIZE=two: start several processes with"),
        ("evaluate keep-all", {}, "only 'tokenenv train' shares its work: start 'tokenenv evalua"),
        ("bench tome:r=1", {}, "torchrun started 2 processes"),
    ],
)
def test_what_several_cannot_do(
    words: str,
    environment: dict[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    several(monkeypatch, **environment)
    assert main(words.split()) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", ["train dora --device cuda", "evaluate keep-all"])
def test_a_mistake_of_all_is_said_by_the_first(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    several(monkeypatch, RANK="1", LOCAL_RANK="1")
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", "")


def test_a_batch_must_have_an_image_for_everyone(tmp_path: Path) -> None:
    request = Request(find_system("dora"), DoraConfig(batch=12, repeats=4), Model(), images=40)
    with pytest.raises(UserError, match=r"batch=12 with.* for 5 processes.* batch=20 or more"):
        request.config.training(request, Workers(0, 5), tmp_path)
    config = DoraPruneConfig(batch=12, repeats=4, selector="random")
    game = config.game(backbone(), source())
    with pytest.raises(UserError, match=r"selector=random draws for one process"):
        config.learner(config.policy(game, "small"), game, 0, Workers(0, 2))
