"""The example of a backbone family of one's own runs, and shows what it says."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from tokenenv.vit import families

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/extend/own_family.py"


def test_it_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    pattern = r"the model: (\S+)\n.* saves (\S+) % .*\ncompressed: logits \(64, 10\)\n"
    found = re.search(pattern, printed)
    assert found is not None, printed
    assert float(found[1]) <= 1e-5
    assert 20 < float(found[2]) < 40
