"""That benchmarks/env_speed.py runs, and that its numbers hang together."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "env_speed.py"


def script() -> Any:
    spec = importlib.util.spec_from_file_location("env_speed", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "words",
    ["--rounds 1", "--batch x", "--batch 0", "--batch 1,", "--tokens -8", "--json no/where"],
)
def test_mistakes_are_met_before_anything_is_measured(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["env_speed", *words.split()])
    with pytest.raises(SystemExit) as ended:
        script().main()
    said = capsys.readouterr()
    assert ended.value.code == 2 and f"error: {words}: " in said.err and not said.out


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("model", "agents", "blocks"), [("digits_vit", 64, 12), ("scenes_vit", 144, 8)]
)
def test_every_contestant_plays(
    model: str, agents: int, blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script()
    monkeypatch.setattr(module, "others", lambda: [])
    result = tmp_path / "speed.json"
    monkeypatch.setattr(
        sys, "argv", ["env_speed", "--quick", "--model", model, "--json", str(result)]
    )
    module.main()
    made = json.loads(result.read_text())
    rows = {(row["name"], row["batch"]): row for row in made["rows"]}
    for row in rows.values():
        assert 0 < row["low"] <= row["median"] <= row["high"]
    # Agent-steps of an image: all tokens, three decisions or one in each block.
    several = {"tensor game": 3 * agents, "tensor game, every block": blocks * agents}
    for name, steps in several.items():
        row = rows[name, 2]
        assert row["median"] / row["images_per_second"] == pytest.approx(steps, rel=1e-6)
    assert rows["naive loop, one image", 1]["median"] < 3 * agents * 1e5
    assert made["tokens"][0]["agents"] == 64 and made["images"]["bare ViT"]["1"] == 1.0
