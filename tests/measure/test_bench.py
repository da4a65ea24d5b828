"""Speed against the dense and the sliced model: what is measured, reported and drawn."""

from __future__ import annotations

import itertools
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import mistake, tree
from helpers import backbone, needs_compiler
from PIL import Image
from test_backbone import family_model, image_for
from torch.testing import assert_close

import tokenenv
from agents.policies.words import parse_policy
from tokenenv.cli.main import main
from tokenenv.game.cost import Cost, measured_macs
from tokenenv.game.policy import play
from tokenenv.measure import candidate
from tokenenv.measure import speed as bench
from tokenenv.measure.candidate import MethodCandidate, sliced

pytestmark = pytest.mark.usefixtures("elsewhere")

KEYS = {
    "what", "batch", "dtype", "compiled", "images_per_s", "speedup", "speedup_q25", "speedup_q75",
    "gmacs", "gmacs_dense", "peak_mib", "slice_speedup", "realised_share", "runtime", "compile_s",
}  # fmt: skip


def policies(*names: str) -> list[MethodCandidate]:
    methods = {name: parse_policy(name, backbone().depth) for name in names}
    return [MethodCandidate(name, method, backbone()) for name, method in methods.items()]


def test_ratios_are_taken_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense, the policy and its slice take 6, 3 and 2 s in the first round, then all slow down."""
    slow = {"dense": 6.0, "norm:keep=0.5": 3.0, "norm:keep=0.5, sliced": 2.0}
    calls = itertools.count(-1)
    asked: list[list[torch.Tensor]] = []

    def seconds(run: Any, batches: list[torch.Tensor], device: torch.device) -> float:
        asked.append(batches)
        if len(asked) == 1:  # how long a pass takes
            next(calls)
            return 0.1
        turn, place = divmod(next(calls), 3)
        name = list(slow)[(turn + place) % 3]  # who goes first changes
        return slow[name] * 2**turn

    monkeypatch.setattr(bench, "_seconds", seconds)
    images = torch.randn(9, 1, 8, 8)
    done: list[int] = []
    dense, half = bench.bench(
        backbone(), policies("norm:keep=0.5"), images, batch=4, rounds=3, progress=done.append
    )
    assert sum(done) == bench.timings(policies("norm:keep=0.5"), 3)
    # No timing is shorter than a quarter of a second.
    assert [len(batches) for batches in asked] == [1] + 9 * [3]
    # All three get the same batches in a round, and no batch comes again.
    for turn in range(3):
        first, *others = asked[1 + 3 * turn : 4 + 3 * turn]
        assert all(torch.equal(torch.stack(first), torch.stack(other)) for other in others)
    passes = [batch for turn in range(3) for batch in asked[1 + 3 * turn]]
    assert all(batch.shape == (4, 1, 8, 8) for batch in passes)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(passes, 2))
    assert (dense.what, dense.speedup, dense.realised_share) == ("dense", 1.0, 1.0)
    assert (half.speedup, half.speedup_q25, half.speedup_q75) == (2.0, 2.0, 2.0)
    assert (half.slice_speedup, half.realised_share) == (3.0, 2.0 / 3)
    assert (dense.images_per_s, half.images_per_s) == (4 / 12, 4 / 6)


@pytest.mark.parametrize("size", [1, 3, 7, 10, 25])
def test_every_image_has_its_turn_before_one_comes_again(size: int) -> None:
    stream = bench.fresh_batches(torch.arange(10.0)[:, None], size)
    drawn = torch.cat([next(stream) for _ in range(40 // size + 1)])[:40, 0]
    epochs = drawn[: len(drawn) // 10 * 10].view(-1, 10)
    assert (epochs.sort(1).values == torch.arange(10)).all()
    assert len(epochs) < 2 or not torch.equal(epochs[0], epochs[1])


def test_multiply_adds_and_memory() -> None:
    found = bench.bench(
        backbone(), policies("norm:keep=0.3", "tome:r=6"), torch.randn(8, 1, 8, 8), rounds=1
    )
    dense, half, tome = found
    assert dense.gmacs == dense.gmacs_dense == Cost(backbone()).dense() / 1e9
    assert half.gmacs < tome.gmacs < dense.gmacs
    # What one block's MLP holds at the least: its input, and the hidden layer before and after.
    assert dense.peak_mib > 8 * 65 * 48 * 9 * 4 / 2**20
    early = bench.bench(
        backbone(), policies("norm:keep=0.3,blocks=0"), torch.randn(8, 1, 8, 8), rounds=1
    )
    assert early[1].peak_mib < 0.6 * dense.peak_mib


@pytest.mark.parametrize("kind", ["deit", "average pooling, no class token"])
def test_the_slice_costs_what_its_token_counts_say(kind: str) -> None:
    model = family_model(kind)
    images = image_for(model, 1)
    with torch.inference_mode():
        whole = [model.prefix + model.patches] * model.depth
        assert_close(sliced(model, images, whole, whole), model(images), atol=1e-5, rtol=0)
        policy = parse_policy("tome:r=9", model.depth)
        episode = play(model, policy, images)
    attended = [int(n) for n in episode.attended]
    fed = [int(n) for n in episode.fed]
    assert fed == [n - 9 for n in attended]
    found = measured_macs(lambda: sliced(model, images, attended, fed))
    expected = Cost(model).backbone_macs(episode.attended, episode.fed).item()
    if model.reads_prefix:  # of the last block only what the head reads
        width, unread = model.attention_dim(3), model.prefix
        hidden = sum(layer.weight.numel() for layer in model.family.linear_layers(3)[1])
        expected -= (attended[3] - unread) * (2 * attended[3] * width + model.dim * width)
        expected -= (fed[3] - unread) * hidden
    assert found == pytest.approx(expected, rel=1e-3)


def test_lengths_change_from_pass_to_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []

    def noted(*args: Any, **options: Any) -> Any:
        episode = play(*args, **options)
        lengths.append(episode.counts[-1].tolist())
        return episode

    monkeypatch.setattr(candidate, "play", noted)
    monkeypatch.setattr(bench, "_SHORTEST", 0.0)
    bench.bench(
        backbone(), policies("random:keep=0.3..0.9,seed=2"), torch.randn(9, 1, 8, 8), rounds=2
    )
    assert len(lengths) == 5 and len(set(lengths[0])) > 3
    assert len(set(map(tuple, lengths[1:]))) == 4


@needs_compiler
def test_the_fastest_dense_form_is_the_measure() -> None:
    found = bench.bench(
        backbone(),
        policies("norm:keep=0.5", "random:keep=0.3..0.9"),
        torch.randn(6, 1, 8, 8),
        batch=3,
        rounds=2,
        compiled="all",
    )
    assert [(row.what, row.compiled) for row in found] == [
        (what, compiled)
        for what in ("dense", "norm:keep=0.5", "random:keep=0.3..0.9")
        for compiled in (False, True)
    ]
    assert max(row.speedup for row in found[:2]) == pytest.approx(1.0)
    assert all((row.compile_s > 0) == row.compiled for row in found)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenenv.machine.shutil.which", lambda name: None)
    found = tokenenv.bench(["keep-all"], batch=[1], rounds=1, dtype="float32")
    assert "no C++ compiler" in found.conditions and not any(row.compiled for row in found.rows)


def test_random_images_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(dense: Any, candidates: Any, images: torch.Tensor, **options: Any) -> list[Any]:
        seen.append(images)
        return []

    monkeypatch.setattr("tokenenv.api.bench.time_all", watched)
    tokenenv.bench(
        ["norm:keep=0.5"], model="test_vit", weights="random", batch=[1], dtype="float32"
    )
    (images,) = seen
    assert len(images) == bench.pool_size(1) == 64
    assert len(images.flatten(1).unique(dim=0)) == 64
    assert [bench.pool_size(size) for size in (8, 20, 64, 600)] == [64, 160, 512, 600]


def test_both_precisions_where_bfloat16_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for fast in (True, False):
        monkeypatch.setattr("tokenenv.api.bench.fast_bfloat16", lambda device, fast=fast: fast)
        found = tokenenv.bench(["keep-all"], batch=[1], rounds=1, compile="none", smaller=False)
        wanted = ["float32", "bfloat16"] if fast else ["float32"]
        assert [row.dtype for row in found.rows if row.what == "dense"] == wanted


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    command = (
        "bench tome:r=3 random:keep=0.5..0.9 --batch 1,5 --rounds 1 --threads 1 --compile none "
        "--dtype float32"
    )
    threads = torch.get_num_threads()
    try:
        assert main([*command.split(), "--json", "b.json", "--out", "b.png"]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = json.loads(Path("b.json").read_text())
    assert [(row["what"], row["batch"]) for row in rows] == [
        (what, batch)
        for batch in (1, 5)
        for what in ("dense", "tome:r=3", "random:keep=0.5..0.9", "resize:size=6")
    ]
    for row in rows:
        assert row.keys() == KEYS
        assert row["speedup_q25"] <= row["speedup"] <= row["speedup_q75"]
        assert row["realised_share"] == pytest.approx(row["speedup"] / row["slice_speedup"])
    with Image.open("b.png") as image:
        assert min(image.size) > 300
        assert len(image.getcolors(2**20) or range(99)) > 20
    out = capsys.readouterr().out
    assert "64 images of digits:test, " in out and ", 1 threads, torch " in out
    assert f"{rows[1]['gmacs']:.4f}" in out and "b.png" in out


def test_other_models_take_random_images_and_weights(capsys: pytest.CaptureFixture[str]) -> None:
    command = (
        "bench norm:keep=0.5,blocks=1 --model test_vit --weights random --batch 2 --rounds 1 "
        "--compile none"
    )
    assert main(command.split()) == 0
    assert "test_vit, random images" in capsys.readouterr().out


def test_a_run_brings_its_model(capfd: pytest.CaptureFixture[str]) -> None:
    error = mistake("bench rl4evit-deit_tiny --model test_vit --weights random", capfd)
    assert "'deit_tiny_patch16_224', not on 'test_vit'" in error


def test_ctrl_c_leaves_no_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def press(*args: Any) -> float:
        signal.raise_signal(signal.SIGINT)
        return 1.0

    monkeypatch.setattr(bench, "_seconds", press)
    command = "bench keep-all --batch 1 --compile none --json new/b.json --out b.png"
    assert main(command.split()) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "tokenenv: interrupted"
    assert not tree(Path.cwd())


def test_ctrl_c_keeps_finished_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    def press(*args: Any, **options: Any) -> Any:
        if options and len(args[2]) == 2:
            signal.raise_signal(signal.SIGINT)
        return play(*args, **options)

    monkeypatch.setattr(candidate, "play", press)
    command = (
        "bench keep-all keep-all --batch 1,1,2 --rounds 1 --compile none --no-smaller "
        "--dtype float32 --json b.json"
    )
    assert main(command.split()) == 130
    rows = json.loads(Path("b.json").read_text())
    assert [(row["what"], row["batch"]) for row in rows] == [("dense", 1), ("keep-all", 1)]


def test_a_compressed_model_is_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    tiny = "--model vit_tiny_patch16_224 --weights random"
    assert main(f"compress tome:r=20 {tiny} --out a".split()) == 0
    assert (
        main(
            [
                "bench",
                "a",
                "--batch",
                "1",
                "--rounds",
                "1",
                "--compile",
                "none",
                "--dtype",
                "float32",
            ]
        )
        == 0
    )
    assert "vit_tiny_patch16_224, random images" in capfd.readouterr().out
    assert "'a' is compressed already" in mistake("compress a --out b", capfd)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("bench", "WHAT"),
        ("bench tome:r=2,r=3", "'tome:r=2,r=3': an argument is given twice"),
        ("bench keep-all --json a --out ./a", "--json and --out name the same file"),
        ("bench keep-all --batch 0", "'0' is no whole number"),
        ("bench keep-all --batch 1,x", "'x' is no whole number"),
        ("bench keep-all --rounds 0", "'0' is no whole number"),
        ("bench keep-all --threads -1", "'-1' is no whole number"),
        ("bench nonsense", "'nonsense' is neither a run folder nor a policy"),
        ("bench keep-all --json .", "--json '.' is a folder"),
        ("bench keep-all --out .", "--out '.' is a folder"),
        ("bench keep-all --model nonsense", "unknown model 'nonsense'"),
        ("bench keep-all --weights gone.safetensors", "'gone.safetensors' does not exist"),
        ("bench random:keep=0.9..0.5", "keep=0.9..0.5 must not fall"),
    ],
)
def test_mistakes(command: str, words: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert words in mistake(command, capfd)
