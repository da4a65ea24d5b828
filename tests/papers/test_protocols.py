"""The papers' numbers are copied right, and their protocols can be run."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.training.request import make_request
from tokenenv.cli import reproduce as command
from tokenenv.errors import UserError
from tokenenv.papers import PAPERS, TIERS, Baseline, Claim, Paper, find_paper
from tokenenv.papers.folders import check_adversarial, check_parts, check_whole, corrupted, wnids
from tokenenv.papers.matching import Measured, match
from tokenenv.papers.protocol import IMAGENET, IMAGENET_A


def relative(data: str, number: str) -> float:
    """DORA's number over the mean of the baselines', less 1, averaged over backbones; percent."""
    rows = [claim for claim in PAPERS["dora-prune"].claims if claim.data == data]
    found = []
    for model in dict.fromkeys(claim.model for claim in rows):
        own = {c.method: getattr(c, number) for c in rows if c.model == model}
        others = [v for name, v in own.items() if v and not name.startswith(("DORA", "dense"))]
        found.append(own["DORA"] / np.mean(others) - 1)
    return round(100 * float(np.mean(found)), 1)


@pytest.mark.parametrize(
    ("data", "number", "printed"),
    [
        (IMAGENET, "gflops", -13.2),
        (IMAGENET, "images_per_s", 32.4),
        (IMAGENET_A, "gflops", -20.3),
        (IMAGENET_A, "images_per_s", 45.6),
    ],
)
def test_the_averages_that_dora_prints_follow_from_its_table(
    data: str, number: str, printed: float
) -> None:
    assert relative(data, number) == printed


def test_what_follows_from_the_dense_models_numbers() -> None:
    rows = PAPERS["dora-prune"].claims_on(IMAGENET, "deit_base_patch16_224")
    dora = next(row for row in rows if row.method == "DORA")
    assert dora.change == pytest.approx(-1.0)
    assert dora.saved == pytest.approx(100 * (1 - 21.7 / 35.2))
    assert dora.speedup == pytest.approx(3944 / 3230)
    told = Claim("a", "m", change=-0.1, saved=33.0)
    assert told.beside(Claim("dense", "m", 79.8, 4.6)) == told  # printed numbers stay


def test_claims_of_another_model_stand_in_where_the_paper_lacks_this_one() -> None:
    paper = PAPERS["dora-prune"]
    assert {c.model for c in paper.claims_on(IMAGENET, "digits_vit")} == {"deit_base_patch16_224"}
    vit = paper.claims_on(IMAGENET, "vit_base_patch16_224")
    assert {c.model.split(".")[0] for c in vit} == {"vit_base_patch16_224"}


@pytest.mark.parametrize("paper", PAPERS.values(), ids=lambda paper: paper.name)
@pytest.mark.parametrize("tier", TIERS)
def test_every_study_has_settings_that_its_system_takes(paper: Paper, tier: str) -> None:
    plan = paper.tiers[tier]
    names = {study.name for study in paper.studies}
    assert set(plan.settings) - {""} <= names
    for study in paper.studies:
        make_request(study.system, model=plan.models[0], **plan.settings_of(study))
        assert not study.under or study.under in names
        assert not study.keep_of or study.keep_of in {each.name for each in paper.baselines}
    labels = [*names, *(each.name for each in paper.baselines)]
    assert len(set(labels)) == len(paper.studies) + len(paper.baselines)


def test_the_command_knows_all_papers_and_tiers() -> None:
    assert (tuple(PAPERS), TIERS) == (command.PAPERS, command.TIERS)
    with pytest.raises(UserError, match="paper='vit': choose from rl4evit"):
        find_paper("vit")


def test_settings_of_a_knob_run_from_mild_to_strong() -> None:
    assert Baseline("a", "tome:r={}", 0.0, 0.5, whole=True).words(8) == [
        f"tome:r={r}" for r in (1, 2, 3, 4)
    ]
    assert Baseline("a", "ats:tokens={}", 1.0, 0.5, whole=True).words(4) == [
        f"ats:tokens={k}" for k in (4, 3, 2)
    ]
    keeps = Baseline("a", "evit:keep={}", 0.99, 0.97).words(8)
    assert keeps == ["evit:keep=0.99", "evit:keep=0.98", "evit:keep=0.97"]


# Matching -----------------------------------------------------------------------------------------
CURVES = st.integers(1, 40).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 100), min_size=n, max_size=n).map(
            lambda v: sorted(v, reverse=True)
        ),
        st.lists(st.integers(0, 100), min_size=n, max_size=n).map(sorted),
    )
)


@given(CURVES, st.integers(0, 100), st.integers(0, 100))
def test_bisection_finds_what_trying_all_would(
    curve: tuple[list[int], list[int]], top1: int, saved: int
) -> None:
    accuracies, savings = curve
    words = [str(i) for i in range(len(accuracies))]
    tried: list[str] = []

    def measure(word: str) -> Measured:
        tried.append(word)
        return Measured(float(accuracies[int(word)]), float(savings[int(word)]))

    reference = Measured(float(top1), float(saved))
    good = [i for i, value in enumerate(accuracies) if value >= top1]
    found = match(words, measure, reference, "top1")
    assert found.word == words[good[-1] if good else 0] and found.reached == bool(good)
    assert len(tried) == len(set(tried)) == found.tried <= math.log2(len(words)) + 2
    enough = [i for i, value in enumerate(savings) if value >= saved]
    found = match(words, measure, reference, "macs")
    assert found.word == words[enough[0] if enough else -1] and found.reached == bool(enough)
    assert found.found == Measured(accuracies[int(found.word)], savings[int(found.word)])


# Folders ------------------------------------------------------------------------------------------
def files(root: Path, names: list[str]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_half_an_imagenet_is_counted_and_what_is_missing_named(tmp_path: Path) -> None:
    first, second = wnids()[:2]
    root = files(tmp_path, [f"train/{first}/1.jpg", f"val/{first}/1.jpg", f"val/{first}/2.jpg"])
    parts = check_parts(str(root))
    assert parts == {"train": {first: 1}, "val": {first: 2}}
    with pytest.raises(UserError, match=rf"'train' has 1 of 1,000 classes and 1 of 1,281,167 "
                       rf"images; there is no {second}, .*: complete it, or"):  # fmt: skip
        check_whole(str(root), parts)
    full = {"train": dict.fromkeys(wnids(), 1282), "val": dict.fromkeys(wnids(), 50)}
    check_whole(str(root), full)
    with pytest.raises(UserError, match=rf"49,990 of 50,000 images; fewer than 50 .* {first}"):
        check_whole(str(root), full | {"val": full["val"] | {first: 40}})


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["train/a/1.jpg"], "holds no folder 'val'"),
        (["val/a/1.jpg"], "holds no folder 'train'"),
        (["train/1.jpg", "val/a/1.jpg"], "train' holds no class folders"),
    ],
)
def test_an_imagenet_in_another_layout(tmp_path: Path, names: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_parts(str(files(tmp_path, names)))


def test_no_folder_at_all() -> None:
    for check in (check_parts, check_adversarial, corrupted):
        with pytest.raises(UserError, match="'gone' is"):
            check("gone")


def test_layouts_of_imagenet_a_and_c(tmp_path: Path) -> None:
    adversarial = files(tmp_path / "a", ["n1/1.jpg"])
    check_adversarial(str(adversarial))
    with pytest.raises(UserError, match="is no folder of CLASS/IMAGE"):
        check_adversarial(str(files(tmp_path / "b", ["1.jpg"])))
    plain = files(tmp_path / "c", ["fog/1/n1/1.jpg", "fog/5/n1/1.jpg", "fog/README/x/1.jpg"])
    assert corrupted(str(plain)) == {f"fog/{s}": str(plain / "fog" / s) for s in "15"}
    grouped = files(tmp_path / "d", ["blur/zoom_blur/3/n1/1.jpg"])
    assert corrupted(str(grouped)) == {"zoom_blur/3": str(grouped / "blur/zoom_blur/3")}
    with pytest.raises(UserError, match="not laid out as CORRUPTION/SEVERITY"):
        corrupted(str(adversarial))
