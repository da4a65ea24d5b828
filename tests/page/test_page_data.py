"""What a page holds, by known answers; and that no text in it becomes HTML."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from actors import steady
from helpers import PATCHES, backbone, source
from image_folders import save
from pages import EVIL, Read, spoiled
from PIL import Image

import tokenenv
from agents.policies.words import parse_policy
from tokenenv.game.rules import TokenPrune
from tokenenv.measure.watching import Seen, see
from tokenenv.page.data import NO_AGENT, PRUNED, data_uri, page_of_images
from tokenenv.page.html import page_html, write_page


def seen(**methods: Any) -> Seen:
    batch = source().batch(torch.arange(3))
    return see(dict.fromkeys(methods, backbone()), backbone(), methods, source(), batch)


@pytest.fixture(scope="module")
def recorded() -> Seen:
    policy = steady(backbone(), TokenPrune((2, 4)), 0.5)
    return seen(tome=parse_policy("tome:r=8,blocks=2/5", 6), agents=policy)


@pytest.fixture(scope="module")
def page(recorded: Seen) -> dict[str, Any]:
    return page_of_images("digits_vit", recorded, [0, 1, -1], ["a", "b", "c"], [])


def numbers(text: str, kind: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), kind)


def test_owners_chances_and_costs_come_back(page: dict[str, Any], recorded: Seen) -> None:
    for m, method in enumerate(recorded.methods.values()):
        for i, image in enumerate(page["images"]):
            run = image["runs"][m]
            owners = numbers(run["owners"], "<u2").reshape(3, PATCHES).astype(int)
            owners[owners == PRUNED] = -1
            assert (owners == [step.owners[i] for step in method.steps]).all()
            assert run["tokens"] == [step.tokens[i] for step in method.steps]
            macs = [step.macs[i] / 1e9 for step in method.steps]
            assert run["gmacs"] == pytest.approx(macs, rel=1e-4)
            assert run["gmacs"][0] == page["methods"][m]["gmacs"]  # nothing is removed yet
            assert len(run["guesses"]) == len(run["rewards"]) == 3
    tome, agents = page["images"][0]["runs"]
    assert tome["chances"] is None and page["methods"][0]["reward"] == "dora"
    assert tome["rewards"][0] is None  # before the first decision
    chances = numbers(agents["chances"], "u1").reshape(2, PATCHES)
    assert (chances[0] == 100).all()  # one half of 200
    gone = numbers(agents["owners"], "<u2").reshape(3, PATCHES)[1] == PRUNED
    assert gone.any() and ((chances[1] == NO_AGENT) == gone).all()


def test_rewards_are_one_number_where_agents_share_them(recorded: Seen) -> None:
    rewards = page_of_images("m", recorded, [0, 1, 2], ["a"] * 3, [])["images"][0]["runs"][1]
    method = recorded.methods["agents"]
    for found, step in zip(rewards["rewards"][1:], method.steps[1:], strict=True):
        assert step.reward is not None
        values = numbers(found, "<f4") if isinstance(found, str) else np.float32(found)
        assert np.broadcast_to(values, PATCHES) == pytest.approx(step.reward[0], rel=1e-4)


def test_classes_are_the_most_probable_ones(page: dict[str, Any], recorded: Seen) -> None:
    for i, image in enumerate(page["images"]):
        label, probability = image["dense"][0]
        assert label == recorded.dense[i].argmax()
        assert probability == pytest.approx(recorded.dense[i].max(), abs=1e-4)
        assert page["names"][str(label)] == str(label)
    assert [image["label"] for image in page["images"]] == [0, 1, None]


def test_small_images_are_stored_as_they_are_and_large_ones_nearly() -> None:
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    large = np.kron(small, np.ones((28, 28, 1), np.uint8))
    for pixels, kind, most in ((small, "png", 0), (large, "jpeg", 40)):
        head, text = data_uri(pixels).split(",")
        assert head == f"data:image/{kind};base64"
        with Image.open(io.BytesIO(base64.b64decode(text))) as image:
            assert np.abs(np.asarray(image.convert("RGB"), int) - pixels).mean() <= most


# HTML ---------------------------------------------------------------------------------------------
def test_the_page_is_one_file_that_loads_nothing(page: dict[str, Any]) -> None:
    html = page_html(page)
    found = Read(html)
    for tag, attributes in found.elements:
        assert tag not in ("iframe", "object", "embed", "base"), tag
        for name in ("src", "href", "action", "srcset"):
            assert (attributes.get(name) or "#")[0] == "#" or attributes[name] == "data:,"
    assert "@import" not in html and "url(" not in html
    assert "default-src 'none'" in html
    assert json.loads(found.data) == json.loads(json.dumps(page))


def test_no_text_becomes_html(page: dict[str, Any]) -> None:
    before, after = Read(page_html(page)), Read(page_html(spoiled(page)))
    assert [tag for tag, _ in before.elements] == [tag for tag, _ in after.elements]
    assert json.loads(after.data)["images"][0]["file"] == EVIL


def test_scripts_set_text_and_never_html() -> None:
    folder = Path(tokenenv.__file__).parent / "page" / "assets"
    scripts = [path.read_text(encoding="utf-8") for path in folder.glob("*.js")]
    assert len(scripts) > 4
    banned = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|Function\(|fetch\("
    assert [re.findall(banned, script) for script in scripts] == [[]] * len(scripts)


# Whole pages --------------------------------------------------------------------------------------
def test_a_page_of_sixty_images_is_small(tmp_path: Path) -> None:
    """Sixty images as large as those of ImageNet models, with 196 tokens and 12 decisions."""
    few = seen(one=parse_policy("tome:r=1", 6), other=parse_policy("random:keep=0.9", 6))
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (60, 14, 14, 3), dtype=np.uint8)
    pixels = [np.asarray(Image.fromarray(image).resize((224, 224))) for image in coarse]
    methods = {}
    for what, method in few.methods.items():
        step = method.steps[1]
        wide = replace(
            step, block=1, owners=rng.integers(0, 197, (60, 196)), tokens=np.full(60, 100),
            macs=np.full(60, 1e9), probabilities=rng.random((60, 1000), np.float32),
            chance=rng.random((60, 196), np.float32), reward=rng.random((60, 196), np.float32),
        )  # fmt: skip
        methods[what] = replace(method, grid=(14, 14), steps=[wide] * 13)
    dense = rng.random((60, 1000), np.float32)
    large = replace(few, pixels=pixels, dense=dense, methods=methods)
    page = page_of_images("m", large, [0] * 60, ["n01440764/n01440764_00001.jpg"] * 60, [])
    assert write_page(tmp_path / "page.html", page) < 8 * 2**20


def test_explore_counts_what_compare_counts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options: dict[str, Any] = {"limit": 40, "batch": ()}
    found = tokenenv.explore(["tome:r=3|6", "resize:size=4"], images=10, **options)
    out = capsys.readouterr().out
    assert "sampled 40 of 600 images of digits:test, balanced over the classes" in out
    table = tokenenv.compare(["tome:r=3|6", "resize:size=4"], published_cost=True, **options)
    assert [r.what for r in found.comparison.rows] == [r.what for r in table.rows]
    assert [r.gmacs for r in found.comparison.rows] == [r.gmacs for r in table.rows]
    assert len(found.shown) == 10 and list(found.seen.methods) == ["tome:r=3", "tome:r=6"]
    assert "10 of 40 images" in found.note and "Not pictured" in found.note
    assert "resize:size=4" in found.note
    size = found.save(tmp_path / "page")
    page = json.loads(Read((tmp_path / "page" / "index.html").read_text(encoding="utf-8")).data)
    assert size < 2**20
    assert [image["label"] for image in page["images"]] == found.source.labels[found.shown].tolist()
    assert [row["what"] for row in page["rows"]] == [
        "dense",
        "tome:r=3",
        "tome:r=6",
        "resize:size=4",
    ]
    assert sum(row["images"] for row in page["classes"]) == 40
    # Each class's share of right images adds up to top-1.
    for row in page["rows"]:
        right = sum(c["images"] * c["top1"][row["what"]] for c in page["classes"]) / 40
        assert right == pytest.approx(row["top1"], abs=1e-2)
        assert 0 <= row["low"] <= row["top1"] <= row["high"] <= 100


def test_explore_refuses_what_takes_no_decisions() -> None:
    with pytest.raises(tokenenv.UserError, match=r"takes no decisions about tokens.*add a method"):
        tokenenv.explore(["resize:size=4"], limit=10)
    with pytest.raises(tokenenv.UserError, match="images=1000"):
        tokenenv.explore(["tome:r=4"], images=1000)


def test_unreadable_images_are_not_shown(tmp_path: Path) -> None:
    for label in range(2):
        for number in range(3):
            save(tmp_path / "data" / str(label) / f"{number}.png", seed=3 * label + number)
    (tmp_path / "data" / "1" / "bad.png").write_bytes(b"no picture")
    found = tokenenv.explore(["tome:r=4"], data=tmp_path / "data", batch=())
    assert found.comparison.dense.images == 6 and len(found.shown) == 6
    assert found.note == "All 6 images."
