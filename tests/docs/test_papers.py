"""Citations of docs/papers.md name a section that it has."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEADING = re.compile(r"^#+ (\d+(?:\.\d+)*) ", re.MULTILINE)
CITATION = re.compile(r"papers\.md,?\s+section\s+(\d+(?:\.\d+)*)")


def test_every_cited_section_of_papers_md_exists() -> None:
    sections = HEADING.findall((ROOT / "docs" / "papers.md").read_text(encoding="utf-8"))
    assert len(sections) == len(set(sections))
    cited: dict[str, set[str]] = {}
    for folder in ("tests", "tokenenv", "agents", "examples", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for section in CITATION.findall(path.read_text(encoding="utf-8")):
                cited.setdefault(section, set()).add(path.relative_to(ROOT).as_posix())
    assert {"1.2", "6"} <= set(cited)  # the tests of DORA's and RL4EViT's identities
    missing = {section: files for section, files in cited.items() if section not in sections}
    assert not missing
