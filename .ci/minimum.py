"""Print the lowest version that ``setup.cfg`` claims for each package, as constraints for pip."""

from __future__ import annotations

import configparser
import re
from pathlib import Path


def lowest(requirements: str) -> list[str]:
    """``"torch>=2.4"`` -> ``"torch==2.4"``; what has no lower bound is left out."""
    found = (re.match(r"([\w.\[\]-]+)>=([\w.]+)", line) for line in requirements.splitlines())
    return [f"{match[1]}=={match[2]}" for match in found if match]


if __name__ == "__main__":
    config = configparser.ConfigParser()
    config.read(Path(__file__).resolve().parents[1] / "setup.cfg")
    required = config["options"]["install_requires"] + config["options.extras_require"]["test"]
    print("\n".join(lowest(required)))
