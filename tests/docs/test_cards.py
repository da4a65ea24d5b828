"""Model cards of the shipped policies: their figures and settings are those measured and stored."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from agents.policies import SHIPPED, shipped

ROOT = Path(__file__).parents[2]


def card(name: str) -> str:
    return (SHIPPED / name / "README.md").read_text(encoding="utf-8")


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|\n").split("|")]


@pytest.mark.parametrize("name", shipped())
def test_figures_are_those_of_the_results(name: str) -> None:
    results = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    section = results.split("\n## DeiT-Tiny\n")[1].split("\n## ")[0]
    (measured,) = re.findall(rf"^(\| `{name}` \|.*\].*\|)$", section, re.MULTILINE)
    (shown,) = re.findall(r"^(\| [\d.]+ % \|.*\|)$", card(name), re.MULTILINE)
    assert cells(shown) == cells(measured)[1:]


@pytest.mark.parametrize("name", shipped())
def test_what_it_says_of_training_is_what_the_config_says(name: str) -> None:
    config = json.loads((SHIPPED / name / "config.json").read_text())
    for said in (
        f"System `{config['system']}`, seed {config['seed']}",
        f"{config['updates']} updates of {config['batch']} images",
        f"It fits `{config['model']}` alone.",
    ):
        assert said in card(name), said


@pytest.mark.parametrize("name", shipped())
def test_the_front_matter_is_what_hugging_face_reads(name: str) -> None:
    found = yaml.safe_load(card(name).split("---\n")[1])
    assert found["license"] == "apache-2.0" and found["pipeline_tag"] == "image-classification"
    assert found["base_model"].startswith("timm/deit_tiny_patch16_224")
