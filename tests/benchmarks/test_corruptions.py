"""The corrupted images of benchmarks/corruptions.py, and its table."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from tokenenv.data import ImageSource, open_source, pixels
from tokenenv.errors import UserError
from tokenenv.measure import evaluation

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MODEL = "test_vit"  # timm's smallest ViT, 160 x 160 pixels
IMAGES = 6


@pytest.fixture(scope="module")
def bench() -> Any:
    """The benchmark as a module; it imports its neighbours as a script does."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("corruptions")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def _library(bench: Any) -> None:
    try:
        bench.library()
    except UserError as error:
        pytest.skip(str(error))


needs_library = pytest.mark.usefixtures("_library")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Coarse patches under fine texture: something to lose for blur and for noise."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        coarse = Image.fromarray(rng.integers(60, 196, (6, 6, 3), dtype=np.uint8))
        fine = rng.integers(-40, 41, (160, 160, 3))
        array = np.asarray(coarse.resize((160, 160), Image.Resampling.NEAREST)) + fine
        place = root / ("n01440764" if number % 2 else "n01443537") / f"{number}.png"
        place.parent.mkdir(exist_ok=True)
        Image.fromarray(array.clip(0, 255).astype(np.uint8)).save(place)
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(MODEL)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def source(folder: Path) -> ImageSource:
    return open_source(str(folder), timm.create_model(MODEL))


def everything(source: ImageSource) -> torch.Tensor:
    return source.batch(torch.arange(len(source))).images


def arguments(folder: Path, weights: Path, *more: str) -> list[str]:
    options = ["--model", MODEL, "--weights", str(weights), "--data", str(folder)]
    return ["tome:r=8", "cls-attention:keep=0.5", *options, *more]


# --- pixels ------------------------------------------------------------------------------------


@needs_library
def test_the_same_pixels_every_time(bench: Any, source: ImageSource) -> None:
    for name in bench.CORRUPTIONS:
        first, second = (everything(bench.corrupted(source, name, 3)) for _ in range(2))
        assert torch.equal(first, second), name
        assert not torch.equal(first, everything(source)), name


@needs_library
def test_pixels_depend_neither_on_cache_nor_on_limit_nor_on_order(
    bench: Any, source: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = everything(bench.corrupted(source, "glass_blur", 2))
    monkeypatch.setattr(pixels, "CACHE_BYTES", 0)
    part = bench.corrupted(source.subset(3, seed=1), "glass_blur", 2)
    order = torch.tensor([2, 0, 1])
    places = [source.files.index(part.files[i]) for i in order]
    for _ in range(2):
        assert torch.equal(part.batch(order).images, whole[places])


@needs_library
def test_image_corruption_and_severity_have_noise_of_their_own(bench: Any) -> None:
    grey = torch.full((3, 64, 64), 128, dtype=torch.uint8)
    corrupt, apply = bench.corrupt, bench.library()
    first = corrupt(apply, "gaussian_noise", 1, grey, 0)
    assert not torch.equal(first, corrupt(apply, "gaussian_noise", 1, grey, 1))
    second = corrupt(apply, "gaussian_noise", 2, grey, 0)
    noises = torch.stack([first, second]).double().flatten(1) - 128
    assert abs(torch.corrcoef(noises)[0, 1]) < 0.1


@needs_library
def test_numpys_generator_is_left_as_it_was(bench: Any, source: ImageSource) -> None:
    np.random.seed(5)
    expected = np.random.random()
    np.random.seed(5)
    everything(bench.corrupted(source, "fog", 1))
    assert np.random.random() == expected


@needs_library
def test_severity_takes_images_away_from_the_clean_ones(bench: Any, source: ImageSource) -> None:
    clean = everything(source)
    away = np.array(
        [
            [
                (everything(bench.corrupted(source, name, severity)) - clean).abs().mean().item()
                for severity in bench.SEVERITIES
            ]
            for name in bench.CORRUPTIONS
        ]
    )
    assert (np.diff(away.mean(0)) > 0).all()
    for name, own in zip(bench.CORRUPTIONS, away, strict=True):
        assert own[4] > own[0] > 0, (name, own)


# --- the table ---------------------------------------------------------------------------------


@needs_library
def test_policies_see_the_same_images_and_the_dense_model_runs_once(
    bench: Any,
    folder: Path,
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[torch.Tensor] = []
    dense: list[bool] = []
    play, evaluate = evaluation.play, evaluation.evaluate

    def record_play(backbone: Any, policy: Any, images: torch.Tensor, *more: Any) -> Any:
        seen.append(images)
        return play(backbone, policy, images, *more)

    def record_evaluate(*args: Any, **kwargs: Any) -> Any:
        dense.append(kwargs["dense"] is None)
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(evaluation, "play", record_play)
    monkeypatch.setattr(evaluation, "evaluate", record_evaluate)
    path = tmp_path / "r.json"
    more = ("--severities", "1/5", "--corruptions", "fog/impulse_noise", "--json", str(path))
    assert bench.main(arguments(folder, weights, *more)) == 0
    assert dense == [True, False] * 5  # clean, and two corruptions at two severities
    assert all(torch.equal(a, b) for a, b in zip(seen[::2], seen[1::2], strict=True))
    out = capsys.readouterr().out
    assert "1 MAC = 1 FLOP, policy included, frozen backbone" in out
    table = json.loads(path.read_text())
    names = ["clean", "fog", "impulse_noise", "mean"]
    assert [row["corruption"] for row in table["rows"]] == names
    assert [row.split()[0] for row in out.splitlines() if row.split()[0] in names] == names
    fog, impulse, mean = table["rows"][1:]
    for key in ("top1", "saved"):
        values = [row["policies"][1][key] for row in (fog, impulse, mean)]
        assert values[2] == pytest.approx((values[0] + values[1]) / 2)
    levels = [level["top1_dense"] for level in fog["severities"]]
    assert fog["top1_dense"] == pytest.approx(sum(levels) / 2)


@needs_library
def test_ctrl_c_prints_what_is_done(
    bench: Any,
    folder: Path,
    weights: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measure = bench.measure

    def stopped(*args: Any) -> Any:
        if args[3] == "fog":
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(bench, "measure", stopped)
    more = ("--severities", "1", "--corruptions", "contrast/fog/snow")
    assert bench.main(arguments(folder, weights, *more)) == 130
    lines = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in lines[-4:-1]] == ["clean", "contrast", "mean"]
    assert lines[-1] == "interrupted: 1 of 3 corruptions are done"


# --- mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--corruptions", "fog/mist"), "unknown corruption 'mist'"),
        (("--corruptions", ""), "unknown corruption ''"),
        (("--severities", "0"), "severity 0 is out of range"),
        (("--severities", "1/6"), "severity 6 is out of range"),
        (("--severities", "strong"), "severities 'strong' must be numbers"),
        (("--batch", "0"), "--batch 0 is too small"),
    ],
)
def test_a_mistake_is_one_line(
    bench: Any, options: tuple[str, str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(["tome:r=8", "--model", MODEL, "--data", "nowhere", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert words in err


def test_a_missing_library_says_what_to_install(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    assert bench.main(["tome:r=8", "--model", MODEL, "--data", "nowhere"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "pip install imagecorruptions-imaug" in err


@needs_library
def test_grey_or_tiny_images_are_refused(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["tome:r=2", "--model", "digits_vit", "--data", "digits"]) == 2
    assert "choose another model" in capsys.readouterr().err
